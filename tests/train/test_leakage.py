"""Scores that are not those of new data: what is warned of, and that no recipe that ships needs it."""

import re
from pathlib import Path

import numpy as np
import pytest

from imgclf_jax import config as configs
from imgclf_jax.data import sources, splits
from imgclf_jax.train.leakage import initial_warnings, overlap_warnings, selecting_sets, selection_warnings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda file: file.stem)
def test_no_recipe_selects_on_its_test_set_or_trains_on_what_it_evaluates(file):
    config = configs.load_file(str(file))
    assert selection_warnings(config) == []
    sizes = {"train": 1000, "val": 100, "test": 100, "validation": 100}
    assert not any(count for count, _ in splits.count_shared(config.data.train, config.data.eval, sizes).values())


@pytest.mark.parametrize(
    "page", sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]), ids=lambda page: page.stem
)
def test_no_page_selects_on_the_test_set(page):
    assert not re.search(r"checkpoint\.best\W+(min:|max:)?test/", page.read_text())


@pytest.mark.parametrize(("best", "evals", "said"), [
    ("", {"test": "test"}, []),
    ("test/accuracy", {"test": "test", "val": "train[90%:]"}, ["checkpoint.best='test/accuracy'", "on the set test"]),
    ("min:photos/my_error", {"photos": "test"}, ["checkpoint.best='min:photos/my_error'", "on the set photos"]),
    ("val/accuracy", {"test": "test", "val": "train[90%:]"}, []),
    ("max:Testing/x", {"Testing": "a", "val": "b"}, ["on the set Testing"]),
])  # fmt: skip
def test_a_run_that_selects_on_its_result(best, evals, said):
    config = configs.default_config()
    config.data.eval = evals
    config.checkpoint.best = best
    found = selection_warnings(config)
    assert len(found) == bool(said)
    assert all(words in sentence for sentence in found for words in said)
    assert list(selecting_sets(config)) == [best.rpartition("/")[0].rpartition(":")[2]] * bool(best)


@pytest.mark.parametrize(("train", "text", "shared"), [
    ("train", "test", (0, 20)),
    ("train", "train[90%:]", (8, 8)),
    ("train[:95%]", "train[90%:]", (4, 8)),
    ("train[:50%]+train[30%:60%]", "train[55%:]+test", (4, 56)),
    ("train[:90%]", "train[90%:]", (0, 8)),
])  # fmt: skip
def test_splits_that_overlap(train, text, shared):
    """Each shared example counts once."""
    assert splits.count_shared(train, {"val": text, "far": "folder('x')/train"}, {"train": 80, "test": 20}) == {
        "val": shared
    }


def test_the_warning_of_an_overlap():
    """Of training examples; a sampling that leaves out some of the split may leave out these."""
    base, config = sources.fake(100, (2, 2, 1), 2), configs.default_config()
    data = config.data
    data.eval = {"val": "train[90%:]", "test": "test"}
    [sentence] = overlap_warnings(config, data, base)
    assert sentence.startswith("the evaluation set val shares 10 of its 10 examples with the training split 'train': ")
    data.sampling = "balanced"
    assert overlap_warnings(config, data, base) == [sentence]
    data.sampling = "subset('ids.npy')"
    assert overlap_warnings(config, data, base) == []
    data.sampling, data.train = "permutation", "gone"
    assert overlap_warnings(config, data, base) == []


@pytest.mark.parametrize(("sampling", "train", "said"), [
    ("subset('F/all.npy')", "train", "10 of its 10"),
    ("subset('F/first.npy')", "train", ""),
    ("subset('F/first.npy')", "train[50%:]+train[:50%]", "4 of its 10"),  # the ids are those of the joined parts
    ("weighted('F/weights.npy')", "train", ""),
    ("weighted('F/weights.npy')", "train[10:]+train[:10]", "10 of its 10"),
    ("my_pkg.my_module:own", "train", "10 of its 10"),  # which may read everything
    ("curriculum('F/weights.npy')", "train", "10 of its 10"),
])  # fmt: skip
def test_only_examples_that_the_sampling_draws_are_shared(sampling, train, said, tmp_path):
    """`subset` of all examples passed as a holdout, and `weighted` with weights of 0 did not."""
    np.save(tmp_path / "all.npy", np.arange(100))
    np.save(tmp_path / "first.npy", np.arange(44))
    np.save(tmp_path / "weights.npy", np.arange(100) < 90)
    base, config = sources.fake(100, (2, 2, 1), 2), configs.default_config()
    config.data.eval, config.data.train = {"val": "train[90%:]", "test": "test"}, train
    config.data.sampling = sampling.replace("F", str(tmp_path))
    found = overlap_warnings(config, config.data, base)
    assert len(found) == bool(said)
    assert not said or found[0].startswith(f"the evaluation set val shares {said} examples with the training split ")


def test_the_overlap_of_a_further_stream():
    """An unlabeled stream of test images is transductive learning: it was not said."""
    base, config = sources.fake(100, (2, 2, 1), 2), configs.default_config()
    config.data.train, config.method = "train[:10%]", "fixmatch"
    config.data.extra = {"unlabeled": "train[10%:]+test|batch_size(8)"}
    config.data.eval = {"test": "test[50:]"}
    [sentence] = overlap_warnings(config, config.data, base)
    assert sentence == (
        "the evaluation set test shares 50 of its 50 examples with data.extra.unlabeled, 'train[10%:]+test': if the "
        "method learns from these images, its scores are transductive, not those of new data; else give the stream a "
        "split without 'test[50:]'"
    )
    config.data.extra.unlabeled = "train[10%:]"
    assert overlap_warnings(config, config.data, base) == []
    config.data.extra.unlabeled = "test|sampling('subset(\"ids.npy\")')"
    assert overlap_warnings(config, config.data, base) == []
    config.data.extra.unlabeled, config.method = "test", "supervised"  # reads no stream, which has its own warning
    assert overlap_warnings(config, config.data, base) == []


@pytest.mark.parametrize(("source", "stream", "text", "said"), [
    ("folder('x')", "test", 'folder("x")/test[:4]', "4 of its 4 examples"),  # the source itself, spelled out
    ("folder('x')", "folder( 'x' )/test", "test", "100 of its 100 examples"),
    ("folder('x')", "folder('y')/train", "folder('y')/train[50%:]", "examples"),
    ("folder('x')", "folder('y')", "folder('y')/train[-9:]", "examples"),
    ("folder('x')", "folder('y')/train[:50%]", "folder('y')/train[50%:]", ""),
    ("folder('x')", "folder('y')/test", "folder('x')/test", ""),
    ("folder('x')", "test", "folder('x/')/test[:4]", "4 of its 4 examples"),
    ("folder('x')", "test", "folder(path='./x', draw=0)/test[:4]", "4 of its 4 examples"),
    ("folder('x')", "test", "folder('x', 5)/test[:4]", ""),
    ("fake(64, (8, 8, 1))", "test", "fake(n=64, shape=(8, 8, 1))/test", "100 of its 100 examples"),
    ("my_pkg:own(3)", "test", "my_pkg:own( 3 )/test", "100 of its 100 examples"),  # imports nothing
])  # fmt: skip
def test_streams_and_sets_are_compared_by_their_source(source, stream, text, said):
    base, config = sources.fake(100, (2, 2, 1), 2), configs.default_config()
    config.data.source, config.method, config.data.extra = source, "fixmatch", {"unlabeled": stream}
    config.data.eval = {"set": text}
    found = overlap_warnings(config, config.data, base)
    assert len(found) == bool(said)
    assert not said or found[0].startswith(f"the evaluation set set shares {said} with data.extra.unlabeled, ")


def test_training_examples_of_one_source_are_not_in_another():
    """`evaluate --config.data.source=…` warned of the training split of the run, by its name alone."""
    base, trained = sources.fake(100, (2, 2, 1), 2), configs.default_config()
    other = trained.copy_and_resolve_references()
    trained.data.source, other.data.source = "folder('old')", "folder('new')"
    other.data.eval = {"new": "train", "old": "folder('old')/train"}
    [sentence] = overlap_warnings(trained, other.data, base)
    assert sentence.startswith("the evaluation set old shares examples with the training split 'train': ")


def test_weights_of_a_run_that_was_trained_on_an_evaluation_set(tmp_path):
    """Pretrained on all of train, fine-tuned on a part of it and scored on the rest, silently."""
    base, config = sources.fake(100, (2, 2, 1), 2), configs.default_config()
    (tmp_path / "config.json").write_text(configs.to_json(config))
    config.data.train, config.data.eval = "train[:90%]", {"val": "train[90%:]", "test": "test"}
    assert initial_warnings(config, base) == []
    config.init_from = str(tmp_path / "weights.pth")
    assert initial_warnings(config, base) == []
    config.init_from = str(tmp_path)
    [sentence] = initial_warnings(config, base)
    assert sentence.startswith(
        f"the weights of init_from={str(tmp_path)!r} are of a run for which this holds: the evaluation set val shares "
        "10 of its 10 examples with the training split 'train': "
    )
    config.data.source = "fake(100)"  # other examples
    assert initial_warnings(config, base) == []

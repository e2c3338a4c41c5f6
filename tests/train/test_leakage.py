"""Scores that are not those of new data: what is warned of, and that no recipe that ships needs it."""

from pathlib import Path

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


def test_the_warning_of_an_overlap():
    """Of training examples; a sampling that leaves out some of the split may leave out these."""
    base, config = sources.fake(100, (2, 2, 1), 2), configs.default_config()
    data = config.data
    data.eval = {"val": "train[90%:]", "test": "test"}
    [sentence] = overlap_warnings(config, data, base)
    assert sentence.startswith("the evaluation set val shares 10 of its 10 examples with data.train='train': ")
    data.sampling = "balanced"
    assert overlap_warnings(config, data, base) == [sentence]
    data.sampling = "subset('ids.npy')"
    assert overlap_warnings(config, data, base) == []
    data.sampling, data.train = "permutation", "gone"
    assert overlap_warnings(config, data, base) == []


def test_the_overlap_of_a_further_stream():
    """An unlabeled stream of test images is transductive learning."""
    base, config = sources.fake(100, (2, 2, 1), 2), configs.default_config()
    config.data.train, config.method = "train[:10%]", "fixmatch"
    config.data.extra = {"unlabeled": "train[10%:]+test|batch_size(8)"}
    config.data.eval = {"test": "test[50:]"}
    [sentence] = overlap_warnings(config, config.data, base)
    assert sentence == (
        "the evaluation set test shares 50 of its 50 examples with data.extra.unlabeled='train[10%:]+test': its scores "
        "are not those of new data; use a split without 'test[50:]'"
    )
    config.data.extra.unlabeled = "folder('elsewhere')/test"
    assert overlap_warnings(config, config.data, base) == []
    config.data.extra.unlabeled, config.method = "test", "supervised"  # reads no stream
    assert overlap_warnings(config, config.data, base) == []


def test_weights_of_a_run_that_was_trained_on_an_evaluation_set(tmp_path):
    base, config = sources.fake(100, (2, 2, 1), 2), configs.default_config()
    (tmp_path / "config.json").write_text(configs.to_json(config))
    config.data.train, config.data.eval = "train[:90%]", {"val": "train[90%:]", "test": "test"}
    assert initial_warnings(config, base) == []
    config.init_from = str(tmp_path / "weights.pth")
    assert initial_warnings(config, base) == []
    config.init_from = str(tmp_path)
    [sentence] = initial_warnings(config, base)
    assert sentence.startswith(
        f"the weights of init_from={str(tmp_path)!r} are of another run: the evaluation set val shares 10 of its "
        "10 examples with data.train='train': "
    )
    config.data.source = "fake(100)"  # other examples
    assert initial_warnings(config, base) == []

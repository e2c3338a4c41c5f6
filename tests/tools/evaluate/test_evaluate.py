"""Evaluation is exact: every example counts once, on any number of devices and for any batch size."""

import json

import jax
import numpy as np
import pytest
from cases import thorough
from scipy.special import log_softmax
from scored import score
from sklearn.metrics import confusion_matrix
from tolerance import rounding

import launch
from imgclf_jax import datasets
from imgclf_jax.core import sharding
from imgclf_jax.data import sources
from imgclf_jax.data.source import read_examples
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train.evaluation import add, evaluate
from imgclf_jax.trained import restore

N = 2_000
CLOSE = rounding(12 * 12 + 32 + 4 + 10)  # two dense layers and the cross-entropy
FAKE = (f"--config.data.source=fake({N}, (12, 12, 1), 10)", "--config.data.train=train[:50%]",
        "--config.preprocess=decode(1)", "--config.augment=pad_crop(1)|normalize", "--config.model=mlp(widths=(32,))",
        "--config.batch_size=200", "--config.log_every=5 steps", "--config.eval_every=5 steps",
        "--config.checkpoint_every=5 steps")  # fmt: skip
# The rate of the second half ruins what the first has learned.
RISE_AND_FALL = ("--config.total=20 steps", "--config.checkpoint.best=test/accuracy",
                 "--config.schedule=step(5e-3, at=('50%',), factor=1e3)")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Workdir:
    """A run on eight devices whose best checkpoint is not its latest."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert launch.main([f"--workdir={workdir}", *FAKE, *RISE_AND_FALL]) == 0
    return Workdir(workdir)


@pytest.fixture(scope="module")
def counted(trained) -> dict:
    """The sums of the best checkpoint over all test examples, by NumPy."""
    programs, state, _ = restore(trained.load_config(), trained, "best")
    examples = read_examples(sources.open_splits(trained.load_config().data.source)["test"], np.arange(N))
    images, labels = examples["image"].astype(np.float32) / np.float32(255), examples["label"]
    logits = np.asarray(programs.recipe.model.apply({"params": state.params}, images, train=False), np.float64)
    right, loss = logits.argmax(1) == labels, -log_softmax(logits, 1)[np.arange(N), labels].sum()
    total = {"examples": N, "correct": right.sum(), "loss": loss, "nll": loss,  # which is the plain cross-entropy
             "top5": (np.argsort(-logits)[:, :5] == labels[:, None]).sum(), "one_right": right.argmax(),
             "confusion": confusion_matrix(labels, logits.argmax(1))}  # fmt: skip
    assert 0.2 < total["correct"] / N < 0.95  # so that being equal says something
    assert total["correct"] < total["top5"] < N
    return total


@pytest.mark.parametrize(("batch_size", "count"), [(7, 8), *thorough((128, 1), (7, 1), (128, 8), (N, 1), (N, 8))])
def test_exact(trained, counted, batch_size, count):
    """Integers are identical and the loss is equal up to rounding, for batch sizes that do not divide the examples."""
    config = trained.load_config()
    with config.unlocked():
        config.batch_size = batch_size
    programs, _, step = restore(config, trained, "best")
    programs = Programs(Recipe(config, programs.recipe.data), sharding.make_mesh(jax.devices()[:count]))
    checkpoints = Checkpoints(trained.checkpoints, read_only=True)
    state = checkpoints.restore(step, programs.shape)["state"]  # saved on eight devices
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {count}
    # The last example, which padding repeats, is one that is classified correctly, so padding would show if counted.
    place = counted["one_right"] + 1
    source = sources.take_split(sources.open_splits(config.data.source), f"test[{place}:]+test[:{place}]")
    images = datasets.eval_images(source, config)
    sums, predictions = evaluate(programs, state, images)
    assert predictions is None  # no metric needs them
    for name in ("examples", "correct", "top5"):
        assert sums[name] == counted[name]
    assert float(sums["loss"]) == pytest.approx(counted["loss"], rel=CLOSE)
    assert float(sums["nll"]) == pytest.approx(counted["nll"], rel=CLOSE)


def test_sums_over_many_batches_are_exact():
    """From 2**24 on, float32 would add no 1."""
    add(sums := {}, {"loss": np.array([2**24, 1], np.float32), "correct": np.array([2**31 - 1, 1], np.int32)})
    assert [value.item() for value in sums.values()] == [2**24 + 1, 2**31]


def test_table(trained, counted, printed):
    """One line per set and one row per class: count, recall, precision, and the most frequent wrong prediction."""
    first, *lines = printed("evaluate", f"--workdir={trained.path}").splitlines()
    start = next(i for i, line in enumerate(lines) if "┃ class " in line)  # behind the table of scores
    assert first.startswith(f"test: examples {N}  accuracy {counted['correct'] / N:.4g}  loss ")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines[start:] if line.startswith("│")]
    confusion = counted["confusion"]
    assert len(rows) == 10
    for i, row in enumerate(rows):
        true, predicted = confusion[i].sum(), confusion[:, i].sum()
        others = np.where(np.arange(10) == i, 0, confusion[i])
        assert row == [str(i), str(true), f"{confusion[i, i] / true:.4f}",
                       f"{confusion[i, i] / predicted:.4f}" if predicted else "",
                       f"{others.argmax()} ({others.max()})" if others.any() else ""]  # fmt: skip


@pytest.mark.thorough
def test_each_checkpoint_has_the_metrics_of_its_time(trained, printed):
    logged = {r["step"]: r["test/accuracy"] for r in read_metrics(trained.path / "metrics.jsonl") if "test/loss" in r}
    assert max(logged, key=logged.__getitem__) == 10
    for which, step in [("best", 10), ("latest", 20), ("15", 15)]:
        result = json.loads(printed("evaluate", f"--workdir={trained.path}", "--format=json", f"--checkpoint={which}"))
        assert (result["step"], result["test"]["accuracy"]) == (step, logged[step])


def test_scores_and_predictions(trained, tmp_path, printed):
    """The scores are those of the written predictions, and the accuracy is the counted one."""
    file = tmp_path / "all.jsonl"
    flags = [f"--workdir={trained.path}", "--config.data.eval.test=test[:500]"]
    found = json.loads(printed("evaluate", *flags, "--format=json", f"--predictions={file}", "--top_k=10"))["test"]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [row["example"] for row in rows] == [str(i) for i in range(500)]
    assert np.mean([row["correct"] for row in rows]) == found["accuracy"] == found["scores"]["accuracy"]["value"]
    labels = np.array([int(row["label"]) for row in rows])
    probabilities = np.zeros((500, 10))
    for row, of_row in zip(rows, probabilities, strict=True):
        for rank in range(1, 11):
            of_row[int(row[f"class_{rank}"])] = row[f"probability_{rank}"]
    for name, value in score(labels, probabilities).items():
        assert found["scores"][name]["value"] == pytest.approx(value, abs=1e-12)
        if name != "calibration_error":
            assert found["scores"][name]["low"] <= value <= found["scores"][name]["high"]

    assert f"macro_f1 │ {found['scores']['macro_f1']['value']:.4f}" in " ".join(printed("evaluate", *flags).split())


def test_a_set_without_class_names_is_taken_by_index(tmp_path, capsys):
    """TFDS's cifar10_corrupted names its classes 0 to 9."""
    images, labels = np.random.default_rng(0).integers(256, size=(16, 12, 12, 1), dtype=np.uint8), np.arange(16) % 3
    named = {"class_names": ["cat", "dog", "fox"]}
    np.savez(tmp_path / "named.npz", x_train=images, y_train=labels, x_test=images, y_test=labels, **named)
    np.savez(tmp_path / "other.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    flags = [f"--config.data.source=arrays('{tmp_path}/named.npz')", *FAKE[2:], "--config.total=2 steps",
             f"--config.data.eval.other=arrays('{tmp_path}/other.npz')/test"]  # fmt: skip
    assert launch.main([f"--workdir={tmp_path / 'run'}", *flags, "--config.batch_size=8"]) == 0
    assert "has no class names: its labels are taken as indices" in capsys.readouterr().err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["other"] == result["test"]

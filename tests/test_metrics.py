"""Metrics of batches and of whole sets, against scikit-learn, and through evaluation's padded batches."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scored import predictions
from sklearn.metrics import accuracy_score, roc_auc_score, top_k_accuracy_score

import launch
from imgclf_jax import losses, metrics
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources
from imgclf_jax.losses import Task
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.scores import classification
from imgclf_jax.tools.evaluate import by_class, listing
from imgclf_jax.tools.report import top_losses
from imgclf_jax.train.evaluation import evaluate, evaluate_all
from imgclf_jax.trained import restore


def sums_of(logits, labels, mask=True, link=losses.SOFTMAX):
    """The sums of a batch; the loss of an example is its number."""
    logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.int32)
    numbers = jnp.arange(len(labels), dtype=jnp.float32)
    return jax.device_get(metrics.task_sums(logits, labels, numbers, link, jnp.broadcast_to(mask, len(labels))))


def predicted(logits, labels, link=losses.SOFTMAX, mask=None):
    """The predictions of a batch, or of an ensemble for logits [seeds, b, classes]."""
    mask = np.ones(len(labels), bool) if mask is None else mask
    batch = metrics.predict(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), link, mask)
    found = metrics.concatenate([jax.device_get(batch)])
    return found.for_seed(-1) if np.ndim(logits) > 2 else found


@pytest.mark.parametrize("classes", [3, 12])
def test_sums_agree_with_scikit_learn(classes):
    """Over the unmasked rows only; masked ones have NaN and wrong labels, and change nothing."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, classes)), rng.integers(0, classes, 200)
    mask = rng.random(200) < 0.7
    kept, truth = logits[mask], labels[mask]
    logits[~mask], labels[~mask] = np.nan, 0
    sums = sums_of(logits, labels, mask)
    assert (sums["examples"], sums["nonfinite"]) == (mask.sum(), 0)
    assert sums["correct"] == accuracy_score(truth, kept.argmax(1), normalize=False)
    assert sums["loss"] == np.flatnonzero(mask).sum()  # the losses are the rows' numbers
    assert ("top5" in sums) == (classes > 5)
    if classes > 5:
        top5 = top_k_accuracy_score(truth, kept, k=5, normalize=False, labels=range(classes))
        assert sums["top5"] == top5


def test_ties_are_won_by_the_first_class():
    """So a model with equal logits for all classes predicts class 0, and has the first five among its five best."""
    logits = np.zeros((4, 3), np.float32)
    logits[3] = [0, 1, 1]
    assert sums_of(logits, [0, 1, 2, 2])["correct"] == 1
    expected = [[1, 0, 0], [1, 0, 0], [1, 1, 0]]
    np.testing.assert_array_equal(by_class.counts(predicted(logits, [0, 1, 2, 2]))["confusion"], expected)
    assert sums_of(np.ones((6, 6)), np.arange(6))["top5"] == 5


BROKEN = {
    "all NaN": lambda row: row * np.nan,
    "one NaN, which argmax takes": lambda row: np.where(np.arange(row.size) == 0, np.nan, row),
    "one infinite": lambda row: np.where(np.arange(row.size) == 0, np.inf, row),
    "all minus infinity": lambda row: np.full_like(row, -np.inf),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_scores_nothing(kind):
    """Its examples are wrong, also those of the first class, and are counted all the same."""
    logits = np.random.default_rng(0).normal(size=(14, 7)).astype(np.float32)
    labels, bad = np.arange(14) % 7, np.arange(14) < 7  # one of each class
    some = np.stack([BROKEN[kind](row) if b else row for row, b in zip(logits, bad, strict=True)])
    sums, rest = sums_of(some, labels), sums_of(logits[~bad], labels[~bad])
    assert (sums["examples"], sums["nonfinite"], rest["examples"], rest["nonfinite"]) == (14, 7, 7, 0)
    assert (sums["correct"], sums["top5"]) == (rest["correct"], rest["top5"])
    counts, others = (by_class.counts(predicted(*given)) for given in ((some, labels), (logits[~bad], labels[~bad])))
    for name in ("predicted", "correct", "confusion"):
        np.testing.assert_array_equal(counts[name], others[name])
    assert counts["examples"].tolist() == [2] * 7


def test_of_several_seeds_one_may_be_broken():
    """Its NaN makes the means NaN, without an error."""
    each = [sums_of(np.eye(3) * scale, np.arange(3)) for scale in (1, np.nan, 1)]
    sums = {name: np.stack([one[name] for one in each]) for name in each[0]}
    sums["loss"] = np.array([0.3, np.nan, np.inf])
    result = metrics.summarize(sums)
    assert (result["accuracy"], result["ensemble_accuracy"]) == (0.5, 1)
    assert np.isnan([result["loss"], result["loss_std"]]).all()
    sums["loss"] = np.array([0.3, np.inf, 0.3])
    assert metrics.summarize(sums)["loss"] == np.inf


def test_scores_are_of_the_predictions_that_are_counted():
    """From logits, whose order float32 probabilities may lose: the sigmoid of 20 and of 30 is 1."""
    logits = np.float32([[20, 30, 40, 50, 60, 70, 80]] * 7)
    logits[6] = np.nan
    labels, mask = np.arange(7), np.arange(7) != 2
    own = predicted(np.stack([logits, -logits, logits]), labels, losses.SIGMOID, mask)
    counted = metrics.summarize(sums_of(logits, labels, mask, losses.SIGMOID), own,
                                metrics.build_whole_set("balanced_accuracy|f1"))  # fmt: skip
    found = {name: value[0] for name, value in own.compute(np.ones((1, 6))).items()}
    assert found["accuracy"] == counted["accuracy"] == counted["balanced_accuracy"] == 0
    assert found["top5"] == counted["top5"] == 3 / 6  # labels 3, 4 and 5 of the six that are counted
    rows = listing.rows("test", "abdefg", own, "0123456", 1)
    assert [(row["class_1"], row["correct"]) for row in rows] == [*[("6", False)] * 5, ("0", False)]


@pytest.mark.parametrize("seeds", [1, 2])
def test_independent_classes_are_ordered_by_their_logits(seeds):
    """A float32 sigmoid is 1 above 17."""
    labels = np.array([0, 1, 0, 1])
    logits = np.array([[20, 18, 25], [18, 21, 30], [23, 18.5, 24], [19, 22, 18]], np.float32)
    own = predicted(np.stack([logits] * 3) if seeds > 1 else logits, labels, losses.SIGMOID)
    assert (own.probabilities == 1).all()
    # Class 0: 20 and 23 against 18 and 19; class 1: 21 and 22 against 18 and 18.5.
    assert classification.auc(own) == 1
    assert classification.auc(predictions(own.labels, own.probabilities)) == 0.5
    rows = listing.rows("test", "abcd", own, "012", 3)
    assert ["".join(row[f"class_{rank}"] for rank in (1, 2, 3)) for row in rows] == ["201", "210", "201", "102"]


@pytest.mark.parametrize(("seeds", "classes"), [(1, 2), (2, 2), (1, 3)])
def test_exclusive_classes_are_ordered_by_their_log_odds(seeds, classes):
    """A float32 softmax is 1 from a gap of 17 on."""
    labels, logits = np.array([0, 1, 0, 1]), np.zeros((4, classes), np.float32)
    logits[:, 1] = [20, 22, 21, 120]
    own = predicted(np.stack([logits] * 3) if seeds > 1 else logits, labels)
    assert (own.probabilities[:, 1] == 1).all()
    assert metrics.build_whole_set("auc")["auc"](own) == classification.auc(own) == 1
    assert classification.auc(predictions(own.labels, own.probabilities)) < 1


@pytest.mark.parametrize("link", [losses.SOFTMAX, losses.SIGMOID])
def test_the_highest_losses_are_of_the_logits(link):
    """Float32 probabilities are 0 from a gap of about 90 on."""
    own = predicted([[0, 110], [0, 90], [0, 250], [3, 1], [40, 0]], np.zeros(5, np.int32), link)
    gaps = np.float64([110, 90, 250, -2, -40]) if link is losses.SOFTMAX else np.float64([0, 0, 0, -3, -40])
    expected = np.log1p(np.exp(-abs(gaps))) + np.maximum(gaps, 0)
    np.testing.assert_allclose(top_losses.label_losses(own), expected, rtol=1e-6)
    if link is losses.SOFTMAX:
        assert top_losses.highest_losses(own, 4).tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize(("text", "says"), [
    ("aucc", "unknown metric 'aucc': did you mean 'auc'"), ("auc(3)", "too many positional arguments"),
    *((text, "results have a metric .* already") for text in
      ("auc|auc", "own:loss", "own:accuracy", "own:examples", "own:f1_std", "own:ensemble_f1")),
])  # fmt: skip
def test_metrics_that_no_run_could_report(text, says, monkeypatch):
    """A second `loss` would replace the first in result.json, and `f1_std` be read as a standard deviation."""
    names = text.partition(":")[2], lambda labels, probabilities: 0.0
    monkeypatch.setitem(sys.modules, "own", types.SimpleNamespace(**dict([names])))
    with pytest.raises(UserError, match=says):
        metrics.build_whole_set(text)


def test_every_metric_says_which_value_is_best():
    """Losses are best when low; an own metric must declare its direction."""
    assert [name for name, sign in metrics.BEST.items() if sign < 0] == ["loss", "nll", "kl"]
    assert metrics.parse_best("val/loss") == ("val/loss", -1.0)
    assert metrics.parse_best("val/auc") == ("val/auc", 1.0)
    assert metrics.parse_best("min:val/error") == ("val/error", -1.0)
    with pytest.raises(UserError, match=r"write 'min:val/error' if the smallest .* 'max:val/error'"):
        metrics.parse_best("val/error")


@pytest.mark.parametrize("task", Task)
def test_what_evaluation_reports(task):
    """All of it has a direction, so that a checkpoint can be chosen by it."""
    wanted = jnp.zeros(4, jnp.int32) if task is Task.CLASSES else jnp.full((4, 2), 0.5)
    link = losses.SIGMOID if task is Task.MULTILABEL else losses.SOFTMAX
    sums = metrics.task_sums(jnp.zeros((4, 2)), wanted, jnp.zeros(4), link, jnp.ones(4, bool), task)
    whole_set, made = metrics.build_whole_set("auc|f1", task), metrics.predict(jnp.ones((4, 2)), wanted, link,
                                                                               jnp.ones(4, bool), task)  # fmt: skip
    names = metrics.reported(sums, whole_set)
    assert names == list(metrics.summarize(sums, metrics.concatenate([jax.device_get(made)]), whole_set))[1:]
    assert set(names) < set(metrics.BEST)
    of_task = {Task.CLASSES: "accuracy", Task.SOFT: "kl", Task.MULTILABEL: "mean_average_precision"}
    assert [kind for kind, name in of_task.items() if name in names] in ([task], [Task.CLASSES, task])


@pytest.mark.thorough
def test_of_a_run(tmp_path, capsys):
    """In result.json and from `evaluate`, over 101 examples in batches of 16; the best checkpoint by AUC is kept."""
    argv = [f"--workdir={tmp_path}", "--config.data.source=fake(101, (8, 8, 1), 2)", "--config.preprocess=decode(1)",
            "--config.model=mlp(widths=(8,))", "--config.total=12 steps", "--config.batch_size=16",
            "--config.eval_every=4 steps", "--config.metrics=auc|balanced_accuracy|f1",
            "--config.checkpoint.best=test/auc"]  # fmt: skip
    assert launch.main(argv) == 0
    workdir = Workdir(tmp_path)
    programs, state, _ = restore(workdir.load_config(), workdir, "latest")
    source = sources.open_splits(workdir.load_config().data.source)["test"]
    images = programs.eval_images(source)
    _, predictions = evaluate(programs, state, images)
    examples = source.read(np.arange(101))
    np.testing.assert_array_equal(predictions.labels, examples["label"])
    pixels = examples["image"].astype(np.float32) / np.float32(255)
    logits = jax.jit(programs.recipe.model.apply)({"params": state.params}, pixels)
    np.testing.assert_allclose(predictions.probabilities, jax.nn.softmax(logits), rtol=1e-5, atol=1e-6)
    expected = roc_auc_score(predictions.labels, predictions.probabilities[:, 1])
    result = json.loads(workdir.result.read_text())["test"]
    assert result["auc"] == pytest.approx(expected, abs=1e-12)
    assert {"balanced_accuracy", "f1"} < set(result)
    broken = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    found = evaluate_all(programs, broken, {"test": images})["test"]
    assert (found["examples"], found["accuracy"], found["balanced_accuracy"], found["f1"]) == (101, 0, 0, 0)
    assert np.isnan([found["loss"], found["auc"]]).all()
    assert "the outputs of 101 examples are NaN or infinite" in capsys.readouterr().err
    assert launch.main(["evaluate", f"--workdir={tmp_path}", "--checkpoint=latest", "--format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["auc"] == result["auc"]

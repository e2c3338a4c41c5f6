"""Metrics of batches and of whole sets, against scikit-learn, and through evaluation's padded batches."""

import jax
import numpy as np
import pytest
from cases import trained_for
from scored import predictions
from sklearn.metrics import accuracy_score, roc_auc_score, top_k_accuracy_score

from imgclf_jax import losses, metrics
from imgclf_jax.losses import Task
from imgclf_jax.run.ranking import parse_best
from imgclf_jax.scores import classification
from imgclf_jax.train.evaluation import evaluate, evaluate_all

task_sums, predict = (jax.jit(f, static_argnames=("link", "task")) for f in (metrics.task_sums, metrics.predict))


def sums_of(logits, labels, mask=True, link=losses.SOFTMAX):
    """The sums of a batch; the loss of an example is its number."""
    numbers, mask = np.arange(len(labels), dtype=np.float32), np.broadcast_to(mask, len(labels))
    return jax.device_get(task_sums(np.float32(logits), np.int32(labels), numbers, link, mask))


def predicted(logits, labels, link=losses.SOFTMAX, mask=None):
    """The predictions of a batch, or of an ensemble for logits [seeds, b, classes]."""
    mask = np.ones(len(labels), bool) if mask is None else mask
    found = metrics.concatenate([jax.device_get(predict(np.float32(logits), np.asarray(labels), link, mask))])
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
        assert sums["top5"] == top_k_accuracy_score(truth, kept, k=5, normalize=False, labels=range(classes))


def test_ties_are_won_by_the_first_class():
    """So a model with equal logits for all classes predicts class 0, and has the first five among its five best."""
    logits = np.zeros((4, 3), np.float32)
    logits[3] = [0, 1, 1]
    assert sums_of(logits, [0, 1, 2, 2])["correct"] == 1
    assert sums_of(np.ones((6, 6)), np.arange(6))["top5"] == 5


BROKEN = {
    "all NaN": lambda row: row * np.nan,
    "one NaN, which argmax takes": lambda row: np.where(np.arange(row.size) == 0, np.nan, row),
    "one infinite": lambda row: np.where(np.arange(row.size) == 0, np.inf, row),
    "all minus infinity": lambda row: np.full_like(row, -np.inf),
}


def broken(kind):
    """(logits, labels) of 14 examples, of which the first seven, one of each class, are broken; those of the others."""
    logits, labels = np.random.default_rng(0).normal(size=(14, 7)).astype(np.float32), np.arange(14) % 7
    return (np.stack([*map(BROKEN[kind], logits[:7]), *logits[7:]]), labels), (logits[7:], labels[7:])


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_scores_nothing(kind):
    """Its examples are wrong, also those of the first class, and are counted all the same."""
    sums, rest = (sums_of(*given) for given in broken(kind))
    assert (sums["examples"], sums["nonfinite"], rest["examples"], rest["nonfinite"]) == (14, 7, 7, 0)
    assert (sums["correct"], sums["top5"]) == (rest["correct"], rest["top5"])


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


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize(("link", "logits"), [
    (losses.SIGMOID, [[20, 18, 25], [18, 21, 30], [23, 18.5, 24], [19, 22, 18]]),
    (losses.SOFTMAX, [[0, 20], [0, 22], [0, 21], [0, 120]]),
    (losses.SOFTMAX, [[0, 20, 0], [0, 22, 0], [0, 21, 0], [0, 120, 0]]),
])  # fmt: skip
def test_examples_are_ordered_by_their_log_odds(link, logits, seeds):
    """A float32 probability is 1 from a gap of 17 on."""
    labels = np.array([0, 1, 0, 1])
    own = predicted(np.stack([np.float32(logits)] * 3) if seeds > 1 else logits, labels, link)
    assert (own.probabilities[:, 1] == 1).all()
    assert metrics.build_whole_set("auc")["auc"](own) == classification.auc(own) == 1
    assert classification.auc(predictions(labels, own.probabilities)) < 1


def constant(labels, probabilities):
    calls.append(len(labels))
    return 0.5


calls = []


def test_an_own_metric_is_computed_twice_only_at_the_first_evaluation():
    """A second call finds a metric that draws or counts; a run may evaluate a thousand times."""
    metric = metrics.build_whole_set(f"{__name__}:constant")["constant"]
    own = predictions(np.array([0, 1]), np.eye(2, dtype=np.float32))
    assert [metric(own) for _ in range(3)] == [0.5] * 3
    assert calls == [2] * 4


def test_every_metric_says_which_value_is_best():
    """Losses are best when low; an own metric must declare its direction."""
    assert [name for name, sign in metrics.BEST.items() if sign < 0] == ["loss", "nll", "kl"]
    assert parse_best("val/loss") == ("val/loss", -1.0)
    assert parse_best("val/auc") == ("val/auc", 1.0)
    assert parse_best("min:val/error") == ("val/error", -1.0)


@pytest.mark.parametrize("task", Task)
def test_what_evaluation_reports(task):
    """All of it has a direction, so that a checkpoint can be chosen by it."""
    zeros, mask = np.zeros((4, 2), np.float32), np.ones(4, bool)
    wanted = np.zeros(4, np.int32) if task is Task.CLASSES else zeros + np.float32(0.5)
    link, whole_set = losses.SIGMOID if task is Task.MULTILABEL else losses.SOFTMAX, metrics.build_whole_set("f1", task)
    sums, made = task_sums(zeros, wanted, zeros[:, 0], link, mask, task), predict(zeros, wanted, link, mask, task)
    names = metrics.reported(sums, whole_set)
    assert names == list(metrics.summarize(sums, metrics.concatenate([jax.device_get(made)]), whole_set))[1:]
    assert set(names) < set(metrics.BEST)
    of_task = {Task.CLASSES: "accuracy", Task.SOFT: "kl", Task.MULTILABEL: "mean_average_precision"}
    assert [kind for kind, name in of_task.items() if name in names] in ([task], [Task.CLASSES, task])


def test_a_whole_set_is_that_of_scikit_learn_and_a_model_of_nan_is_told(fake_config, caplog):
    """Over 101 examples in padded batches of 16."""
    fake_config.update_from_flattened_dict({"data.source": "fake(101, (8, 8, 1), 2)", "metrics": "auc|f1"})
    programs, split, images, state = trained_for(fake_config, 2)
    _, own = evaluate(programs, state, images)
    np.testing.assert_array_equal(own.labels, split.read(np.arange(101))["label"])
    found = evaluate_all(programs, state, {"test": images})["test"]
    assert found["auc"] == pytest.approx(roc_auc_score(own.labels, own.probabilities[:, 1]), abs=1e-12)
    broken = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    found = evaluate_all(programs, broken, {"test": images})["test"]
    assert (found["examples"], found["accuracy"], found["f1"]) == (101, 0, 0)
    assert np.isnan([found["loss"], found["auc"]]).all()
    assert "the outputs of 101 examples are NaN or infinite" in caplog.text


@pytest.mark.parametrize(("link", "gaps"), [
    (losses.SOFTMAX, [110, 90, 250, -2, -40]), (losses.SIGMOID, [0, 0, 0, -3, -40]),
])  # fmt: skip
def test_the_highest_losses_are_of_the_logits(link, gaps):
    """Float32 probabilities are 0 from a gap of about 90 on."""
    own = predicted([[0, 110], [0, 90], [0, 250], [3, 1], [40, 0]], np.zeros(5, np.int32), link)
    findings = pytest.importorskip("imgclf_jax.tools.report.findings")
    np.testing.assert_allclose(findings.label_losses(own), np.logaddexp(0.0, gaps), rtol=1e-6)
    if link is losses.SOFTMAX:
        assert findings.highest_losses(own, 4).tolist() == [2, 0, 1, 3]

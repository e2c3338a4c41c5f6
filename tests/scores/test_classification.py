"""Scores of class and multi-label predictions, against scikit-learn."""

import numpy as np
import pytest
import sklearn.metrics
from scored import by_sklearn, example, predictions, score
from sklearn import metrics as sk

from imgclf_jax.core.errors import UserError
from imgclf_jax.scores import classification, multilabel
from imgclf_jax.scores.multilabel import TargetPredictions


@pytest.mark.parametrize(("n", "classes"), [(200, 2), (300, 3), (400, 12)])
@pytest.mark.parametrize("weighted", [False, True])
def test_scores_are_those_of_scikit_learn(n, classes, weighted):
    """Weights, as of a bootstrap's resamples, count as repetitions."""
    labels, probabilities = example(n, classes)
    weights = np.random.default_rng(3).integers(0, 4, (2, n)).astype(float) if weighted else np.ones((1, n))
    found = predictions(labels, probabilities).compute(weights)
    for i, own in enumerate(weights):
        expected = by_sklearn(labels, probabilities, own if weighted else None)
        assert {name: value[i] for name, value in found.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("nan", [False, True])
def test_metrics_are_those_of_scikit_learn(classes, nan):
    """A row with NaN predicts no class, and makes what is no count of predictions NaN."""
    labels, probabilities = example(200, classes)
    probabilities /= probabilities.sum(1, keepdims=True)
    if nan:
        probabilities[labels == 0] = np.nan
    own, binary = predictions(labels, probabilities), classes == 2
    found = np.where(np.isnan(probabilities[:, 0]), -1, probabilities.argmax(1))
    recall = sk.recall_score(labels, found, labels=range(classes), average="macro")
    assert classification.balanced_accuracy(own) == pytest.approx(recall, abs=1e-12)
    f1 = sk.f1_score(labels, found, labels=[1] if binary else range(classes), average="macro", zero_division=0)
    assert classification.f1(own) == pytest.approx(f1, abs=1e-12)
    area = np.nan if nan else sk.roc_auc_score(labels, probabilities[:, 1] if binary else probabilities,
                                               multi_class="ovr", average="macro")  # fmt: skip
    assert classification.auc(own) == pytest.approx(area, abs=1e-12, nan_ok=True)
    scores = score(labels, probabilities)
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(labels, found))
    assert [name for name, x in scores.items() if np.isnan(x)] == ["auc", "brier", "calibration_error"] * nan


def test_classes_that_never_come():
    """A class that is neither a label nor predicted does not count; one that is only predicted has precision 0."""
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.7, 0.2, 0.1, 0.0], [0.1, 0.2, 0.7, 0.0], [0.2, 0.7, 0.1, 0.0], [0.3, 0.6, 0.1, 0.0]])
    found = score(labels, probabilities)
    assert found["macro_precision"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["macro_recall"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["auc"] == pytest.approx(np.mean([sk.roc_auc_score(labels == c, probabilities[:, c]) for c in (0, 1)]))
    assert np.isnan(classification.auc(predictions(labels[:2], probabilities[:2])))  # one class alone


def drawn(n=300, decimals=2):
    """0/1 targets of seven classes of unequal frequency, and probabilities f32 with ties."""
    rng = np.random.default_rng(7)
    targets = (rng.random((n, 7)) < np.linspace(0.05, 0.8, 7)).astype(np.float32)
    raw = np.round(0.5 * rng.random((n, 7)) + 0.35 * targets + 0.05, decimals)
    return targets, raw.astype(np.float32)


def target_predictions(targets, probabilities, ranking=None):
    return TargetPredictions(targets, probabilities, probabilities if ranking is None else ranking)


def of_all(targets, probabilities, ranking=None, weights=1.0):
    found = target_predictions(targets, probabilities, ranking).compute(weights * np.ones((1, len(targets))))
    return {name: float(value[0]) for name, value in found.items()}


@pytest.mark.parametrize("decimals", [1, 2, 9])
def test_scores_are_scikit_learns(decimals):
    targets, probabilities = drawn(decimals=decimals)
    found, predicted = of_all(targets, probabilities), probabilities >= 0.5
    expected = {
        "mean_average_precision": sklearn.metrics.average_precision_score(targets, probabilities, average="macro"),
        **{f"{how}_f1": sklearn.metrics.f1_score(targets, predicted, average=how) for how in ("micro", "macro")},
        "exact_match": sklearn.metrics.accuracy_score(targets, predicted),
    }
    assert found == {name: pytest.approx(value, abs=1e-12) for name, value in expected.items()}
    assert 0 < found["exact_match"] < found["macro_f1"] < 1
    area = sklearn.metrics.roc_auc_score(targets, probabilities, average="macro")
    assert multilabel.auc(target_predictions(targets, probabilities)) == pytest.approx(area, abs=1e-12)


def test_weights_of_examples_are_repetitions():
    targets, probabilities = drawn(60)
    counts = np.random.default_rng(0).integers(0, 4, 60)
    weighted = of_all(targets, probabilities, weights=counts)
    assert weighted == pytest.approx(of_all(targets.repeat(counts, 0), probabilities.repeat(counts, 0)), abs=1e-12)


def test_a_class_without_examples_is_left_out_of_means_and_nan_is_no_exact_match():
    targets, probabilities = drawn()
    alone = of_all(targets, probabilities)
    absent = np.zeros((len(targets), 1), np.float32)
    both = of_all(np.hstack([targets, absent]), np.hstack([probabilities, absent + 0.1]))
    assert both["mean_average_precision"] == alone["mean_average_precision"]
    assert both["macro_f1"] == alone["macro_f1"]
    assert np.isnan(of_all(absent, absent)["mean_average_precision"])
    broken = of_all(absent[:4], np.float32([[np.nan], [0.1], [0.1], [0.1]]))
    assert broken["exact_match"] == 0.75
    assert np.isnan([broken["mean_average_precision"], broken["micro_f1"]]).all()


def test_logits_rank_what_float32_rounds_to_one():
    """All probabilities of a confident model are 1; the logits still distinguish the examples."""
    targets = np.array([[1], [0]], np.float32)
    logits, probabilities = np.array([[40.0], [30.0]], np.float32), np.ones((2, 1), np.float32)
    assert of_all(targets, probabilities)["mean_average_precision"] == 0.5
    assert of_all(targets, probabilities, ranking=logits)["mean_average_precision"] == 1.0


def test_thresholds_may_differ_by_class():
    targets, probabilities = drawn()
    thresholds = tuple(np.linspace(0.3, 0.7, 7).round(2).tolist())
    predicted = probabilities >= np.asarray(thresholds, np.float32)
    for average in ("macro", "micro"):
        found = multilabel.f1(target_predictions(targets, probabilities), thresholds, average)
        assert found == pytest.approx(sklearn.metrics.f1_score(targets, predicted, average=average), abs=1e-12)
    for wrong in ({"threshold": (0.5, 0.5)}, {"threshold": "a"}, {"average": "weighted"}):
        with pytest.raises(UserError, match=r"threshold must be a number or 7 of them, one per class, and average 'ma"):
            multilabel.f1(target_predictions(targets, probabilities), **wrong)

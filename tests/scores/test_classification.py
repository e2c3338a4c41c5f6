"""Scores of class predictions, against scikit-learn."""

import numpy as np
import pytest
from scored import by_sklearn, example, predictions, score
from sklearn import metrics as sk

from imgclf_jax.scores import classification


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

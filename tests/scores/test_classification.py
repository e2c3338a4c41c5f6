"""Scores of class predictions, against scikit-learn."""

import numpy as np
import pytest
from scored import by_sklearn, example, predictions, score
from sklearn import metrics as sk

from imgclf_jax.scores import classification

SHAPES = [(200, 2), (300, 3), (400, 12)]


@pytest.mark.parametrize(("n", "classes"), SHAPES)
def test_scores_are_those_of_scikit_learn(n, classes):
    labels, probabilities = example(n, classes)
    found, expected = score(labels, probabilities), by_sklearn(labels, probabilities)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize(("n", "classes"), SHAPES)
def test_weights_count_as_repetitions(n, classes):
    labels, probabilities = example(n, classes)
    weights = np.random.default_rng(3).integers(0, 4, (3, n)).astype(float)
    found = predictions(labels, probabilities).compute(weights)
    for i in range(3):
        expected = by_sklearn(labels, probabilities, weights[i])
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value, abs=1e-12), name


def test_a_confidence_of_one_belongs_to_the_last_bin():
    probabilities = np.array([[1.0, 0.0], [0.99, 0.01], [1.0, 0.0], [14 / 15, 1 / 15]])
    assert classification.confidence_bins(probabilities.max(1)).tolist() == [14, 14, 14, 13]
    found = score(np.array([0, 0, 1, 0]), probabilities)["calibration_error"]
    assert found == pytest.approx(abs(1.0 + 0.99 + 1.0 - 2) / 4 + abs(14 / 15 - 1) / 4, abs=1e-12)


def test_classes_that_never_come():
    """A class that is neither a label nor predicted does not count; one that is only predicted has precision 0."""
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.7, 0.2, 0.1, 0.0], [0.1, 0.2, 0.7, 0.0], [0.2, 0.7, 0.1, 0.0], [0.3, 0.6, 0.1, 0.0]])
    found = score(labels, probabilities)
    assert found["macro_precision"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["macro_recall"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["auc"] == pytest.approx(np.mean([sk.roc_auc_score(labels == c, probabilities[:, c]) for c in (0, 1)]))


def test_nan_predicts_no_class():
    labels, probabilities = example(50, 3)
    probabilities[7] = np.nan
    found = score(labels, probabilities)
    keep = np.arange(50) != 7
    assert found["accuracy"] == pytest.approx((probabilities[keep].argmax(1) == labels[keep]).sum() / 50)
    assert [name for name, value in found.items() if np.isnan(value)] == ["auc", "brier", "calibration_error"]

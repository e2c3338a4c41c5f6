"""Scores beside scikit-learn's, intervals beside the slow way and by how often they hold the truth."""

import numpy as np
import pytest
from sklearn import metrics as sk

from imgclf_jax.analysis import scores

SHAPES = [(200, 2), (300, 3), (400, 12)]


def example(n, classes, seed=0, sharpness=1.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 1.5
    labels = rng.integers(0, classes, n)
    logits[np.arange(n), labels] += sharpness
    probabilities = np.exp(logits)
    return labels, np.round(probabilities / probabilities.sum(1, keepdims=True), 2)  # rounded, so that some are equal


def by_sklearn(labels, probabilities, weights=None):
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    given = {"sample_weight": weights}
    macro = {"average": "macro", "zero_division": 0, **given}
    first = 1 if classes == 2 else 0
    areas = [sk.roc_auc_score(labels == c, probabilities[:, c], **given) for c in range(first, classes)]
    squares = ((probabilities - np.eye(classes)[labels]) ** 2).sum(1) / (2 if classes == 2 else 1)
    out = {
        "accuracy": sk.accuracy_score(labels, predicted, **given),
        "macro_precision": sk.precision_score(labels, predicted, **macro),
        "macro_recall": sk.recall_score(labels, predicted, **macro),
        "macro_f1": sk.f1_score(labels, predicted, **macro),
        "auc": np.mean(areas),
        "brier": np.average(squares, weights=weights),
        "calibration_error": calibration(labels, probabilities, weights),
    }
    if classes > 5:
        top5 = [label in np.argsort(-row, kind="stable")[:5] for label, row in zip(labels, probabilities, strict=True)]
        out["top5"] = np.average(top5, weights=weights)
    return out


def calibration(labels, probabilities, weights):
    """By the definition, bin by bin."""
    weights = np.ones(len(labels)) if weights is None else weights
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    error = 0.0
    for m in range(15):
        inside = (confidence * 15 > m) & (confidence * 15 <= m + 1) if m else confidence * 15 <= 1
        if weights[inside].sum():
            share = weights[inside].sum() / weights.sum()
            means = [np.average(values[inside], weights=weights[inside]) for values in (confidence, right)]
            error += share * abs(means[0] - means[1])
    return error


@pytest.mark.parametrize(("n", "classes"), SHAPES)
def test_scores_are_those_of_scikit_learn(n, classes):
    labels, probabilities = example(n, classes)
    found, expected = scores.score(labels, probabilities), by_sklearn(labels, probabilities)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_the_brier_score_is_that_of_scikit_learn():
    for n, classes in SHAPES:
        labels, probabilities = example(n, classes)
        probabilities = probabilities / probabilities.sum(1, keepdims=True)
        given = probabilities[:, 1] if classes == 2 else probabilities
        expected = sk.brier_score_loss(labels, given, labels=np.arange(classes))
        assert scores.score(labels, probabilities)["brier"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "classes"), SHAPES)
def test_weights_count_as_repetitions(n, classes):
    labels, probabilities = example(n, classes)
    weights = np.random.default_rng(3).integers(0, 4, (3, n)).astype(float)
    found = scores.Scores(labels, probabilities).of(weights)
    for i in range(3):
        expected = by_sklearn(labels, probabilities, weights[i])
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value, abs=1e-12), name


def test_a_confidence_of_one_belongs_to_the_last_bin():
    probabilities = np.array([[1.0, 0.0], [0.99, 0.01], [1.0, 0.0], [14 / 15, 1 / 15]])
    assert scores.Scores(np.zeros(4, int), probabilities).bins.tolist() == [14, 14, 14, 13]
    found = scores.score(np.array([0, 0, 1, 0]), probabilities)["calibration_error"]
    assert found == pytest.approx(abs(1.0 + 0.99 + 1.0 - 2) / 4 + abs(14 / 15 - 1) / 4, abs=1e-12)


def test_classes_that_never_come():
    """One that is no label and is never predicted does not count; one that is only predicted has precision 0."""
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.7, 0.2, 0.1, 0.0], [0.1, 0.2, 0.7, 0.0], [0.2, 0.7, 0.1, 0.0], [0.3, 0.6, 0.1, 0.0]])
    found = scores.score(labels, probabilities)
    assert found["macro_precision"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["macro_recall"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["auc"] == pytest.approx(np.mean([sk.roc_auc_score(labels == c, probabilities[:, c]) for c in (0, 1)]))


def test_nan_predicts_no_class():
    labels, probabilities = example(50, 3)
    probabilities[7] = np.nan
    found = scores.score(labels, probabilities)
    keep = np.arange(50) != 7
    assert found["accuracy"] == pytest.approx((probabilities[keep].argmax(1) == labels[keep]).sum() / 50)
    assert [name for name, value in found.items() if np.isnan(value)] == ["brier", "calibration_error", "auc"]


def test_intervals_are_those_of_the_slow_way():
    labels, probabilities = example(80, 3)
    found = scores.intervals(labels, probabilities, samples=50, seed=5)
    weights = np.random.default_rng(5).multinomial(80, np.full(80, 1 / 80), 50)
    slow = []
    for row in weights:
        places = np.repeat(np.arange(80), row)
        slow.append(by_sklearn(labels[places], probabilities[places]))
    for name in slow[0]:
        assert found[name] == pytest.approx(np.percentile([one[name] for one in slow], [2.5, 97.5]), abs=1e-12), name


def test_intervals_hold_the_truth_in_about_95_of_100_sets():
    """The truth is the score on a very large set; of 150 sets of 300 examples, 95 % ± 5 % hold it."""
    truth = scores.score(*example(200_000, 3, seed=1))
    held = dict.fromkeys(("accuracy", "macro_precision", "macro_recall", "macro_f1", "auc", "brier"), 0)
    for seed in range(150):
        found = scores.intervals(*example(300, 3, seed=100 + seed), samples=200)
        for name in held:
            held[name] += found[name][0] <= truth[name] <= found[name][1]
    assert all(135 <= count <= 149 for count in held.values()), held


def test_a_large_set_takes_parts(monkeypatch):
    labels, probabilities = example(60, 3)
    whole = scores.intervals(labels, probabilities, samples=20)
    monkeypatch.setattr(scores, "_AT_ONCE", 60 * 7)
    for name, interval in scores.intervals(labels, probabilities, samples=20).items():
        assert interval == pytest.approx(whole[name], abs=1e-14)
    monkeypatch.setattr(scores, "_MOST_AUC", 10)
    assert scores.intervals(labels, probabilities, samples=20).keys() == whole.keys() - {"auc"}

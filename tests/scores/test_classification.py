"""Scores against scikit-learn; intervals against a slow computation and by their coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics as sk

from imgclf_jax.scores import classification as scores

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
    own = {"sample_weight": weights}
    macro = {"average": "macro", "zero_division": 0, **own}
    first = 1 if classes == 2 else 0
    areas = [sk.roc_auc_score(labels == c, probabilities[:, c], **own) for c in range(first, classes)]
    squares = ((probabilities - np.eye(classes)[labels]) ** 2).sum(1) / (2 if classes == 2 else 1)
    out = {
        "accuracy": sk.accuracy_score(labels, predicted, **own),
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


def intervals(*args, **more):
    found = scores.with_intervals(*args, **more)
    return {name: (score["low"], score["high"]) for name, score in found.items() if "low" in score}


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


@pytest.mark.parametrize(("n", "classes"), SHAPES)
def test_weights_count_as_repetitions(n, classes):
    labels, probabilities = example(n, classes)
    weights = np.random.default_rng(3).integers(0, 4, (3, n)).astype(float)
    found = scores.Scores(labels, probabilities).compute(weights)
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
    """A class that is neither a label nor predicted does not count; one that is only predicted has precision 0."""
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
    found = intervals(labels, probabilities, samples=50, seed=5)
    weights = np.random.default_rng(5).multinomial(80, np.full(80, 1 / 80), 50)
    slow = []
    for row in weights:
        places = np.repeat(np.arange(80), row)
        slow.append(by_sklearn(labels[places], probabilities[places]))
    for name in slow[0].keys() - {"accuracy", "calibration_error"}:
        assert found[name] == pytest.approx(np.percentile([one[name] for one in slow], [2.5, 97.5]), abs=1e-12), name
    right = int(sum(probabilities.argmax(1) == labels))
    assert found["accuracy"] == pytest.approx(binomtest(right, 80).proportion_ci(method="wilson"), abs=1e-12)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 10), (14, 14), (50, 50), (355, 360)])
def test_intervals_of_proportions_are_scipys(right, n):
    """They have a width even if all examples are right, or none, or there is only one."""
    labels, probabilities = np.zeros(n, int), np.full((n, 6), 0.1) + np.eye(6)[(np.arange(n) >= right) * 5] * 0.4
    for name, count in (("accuracy", right), ("top5", n)):
        low, high = intervals(labels, probabilities)[name]
        assert (low, high) == pytest.approx(binomtest(count, n).proportion_ci(method="wilson"), abs=1e-12)
        assert 0 <= low <= count / n <= high <= 1
        assert high - low > 0.005


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_every_interval_holds_its_value(data):
    """With few examples too, absent classes, equal probabilities, and confident models."""
    n, classes = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 7))
    row = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 30.0]), min_size=classes, max_size=classes)
    probabilities = np.exp(data.draw(st.lists(row, min_size=n, max_size=n)))
    probabilities /= probabilities.sum(1, keepdims=True)
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    found = intervals(labels, probabilities, samples=50)
    for name, value in scores.score(labels, probabilities).items():
        if name in found:
            assert found[name][0] <= value <= found[name][1], name
            assert found[name][1] <= 2 if name == "brier" else found[name][1] <= 1 + 1e-9, name
        else:
            resampled = scores.bootstrap(scores.Scores(labels, probabilities).compute, n, 50)
            low, high = np.nanpercentile(resampled[name], [2.5, 97.5]) if n > 1 and not np.isnan(value) else (0, 0)
            assert low == high or name == "calibration_error", name


def with_known_calibration(n, temperature, seed):
    """A set with labels drawn from probabilities that the model has sharpened or flattened."""
    rng = np.random.default_rng([n, seed])
    logits = 3 * rng.normal(size=(n, 3))
    truth, model = (np.exp(logits / t) / np.exp(logits / t).sum(1, keepdims=True) for t in (1.0, temperature))
    return (truth.cumsum(1) < rng.random((n, 1))).sum(1).clip(0, 2), model, truth


def calibration_coverage(n, temperature, sets):
    """(fraction of intervals that contain the true calibration error, that error), from the known probabilities."""
    _, model, truth = with_known_calibration(400_000, temperature, 0)
    confidence, bins = model.max(1), scores.Scores(np.zeros(400_000, int), model).bins
    gaps = np.bincount(bins, confidence - truth[np.arange(400_000), model.argmax(1)])
    error = np.abs(gaps).sum() / 400_000
    held = 0
    for seed in range(sets):
        labels, model, _ = with_known_calibration(n, temperature, seed + 1)
        own = scores.Scores(labels, model)
        low, high = scores.calibration_interval(own)
        value = scores.score(labels, model)["calibration_error"]
        held += min(low, value) <= error <= max(high, value)
    return held / sets, error


def test_the_interval_of_the_calibration_error_holds_the_true_one():
    """A calibrated model has none, but few examples always show some; the bootstrap's percentiles never contained 0."""
    held, error = calibration_coverage(200, 1.0, 60)
    assert error < 0.002
    assert held > 0.88


@pytest.mark.thorough
@pytest.mark.parametrize("temperature", [1.0, 1.2, 0.7, 0.4])
@pytest.mark.parametrize("n", [50, 200, 1000])
def test_it_holds_the_true_one_of_any_model(n, temperature):
    assert 0.9 < calibration_coverage(n, temperature, 200)[0] <= 1


@pytest.mark.thorough
def test_intervals_hold_the_truth_in_about_95_of_100_sets():
    """The truth is the score on a very large set; 95 % ± 5 % of 150 sets of 300 examples contain it."""
    truth = scores.score(*example(200_000, 3, seed=1))
    held = dict.fromkeys(("accuracy", "macro_precision", "macro_recall", "macro_f1", "auc", "brier"), 0)
    for seed in range(150):
        found = intervals(*example(300, 3, seed=100 + seed), samples=200)
        for name in held:
            held[name] += found[name][0] <= truth[name] <= found[name][1]
    assert all(135 <= count <= 149 for count in held.values()), held


def test_a_large_set_takes_parts(monkeypatch):
    labels, probabilities = example(60, 3)
    whole = intervals(labels, probabilities, samples=20)
    monkeypatch.setattr(scores, "_MAX_WEIGHTS", 60 * 7)
    for name, interval in intervals(labels, probabilities, samples=20).items():
        assert interval == pytest.approx(whole[name], abs=1e-14)
    monkeypatch.setattr(scores, "_MAX_COST", 10)
    assert intervals(labels, probabilities, samples=20).keys() == whole.keys() - {"auc"}


def test_a_perfect_score_has_no_interval_of_no_width():
    """24 of 24 right: accuracy has the Wilson interval, and what all resamples agree on has none."""
    labels = np.arange(24) % 3
    for confidence in (0.9, 1.0):
        probabilities = np.full((24, 3), (1 - confidence) / 2)
        probabilities[np.arange(24), labels] = confidence
        found = scores.with_intervals(labels, probabilities)
        assert found["accuracy"]["value"] == found["macro_f1"]["value"] == found["auc"]["value"] == 1
        assert found["accuracy"]["low"] == pytest.approx(binomtest(24, 24).proportion_ci(method="wilson").low)
        assert all(score["low"] < score["high"] for score in found.values() if "low" in score)
        assert {"macro_precision", "macro_recall", "macro_f1", "auc"} <= {
            name for name, score in found.items() if "low" not in score
        }
    perfect = scores.with_bootstrap(lambda w: {"exact_match": np.ones(len(w)), "f1": np.ones(len(w))}, 24, 24)
    assert perfect == {
        "exact_match": {"value": 1.0, "low": found["accuracy"]["low"], "high": 1.0},
        "f1": {"value": 1.0},
    }

"""Confidence intervals: Wilson's, and the bootstrap's against a slow computation and by its coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from scored import by_sklearn, example, predictions, score

from imgclf_jax.tools.evaluate import intervals


def ends(labels, probabilities):
    found = intervals.with_intervals(predictions(labels, probabilities).compute, *probabilities.shape)
    return {name: (score["low"], score["high"]) for name, score in found.items() if "low" in score}


def test_the_bootstrap_is_that_of_the_slow_way():
    labels, probabilities = example(80, 3)
    found = intervals.bootstrap(predictions(labels, probabilities).compute, 80, samples=50, seed=5)
    weights = np.random.default_rng(5).multinomial(80, np.full(80, 1 / 80), 50)
    for i, row in enumerate(weights):
        places = np.repeat(np.arange(80), row)
        for name, value in by_sklearn(labels[places], probabilities[places]).items():
            assert found[name][i] == pytest.approx(value, abs=1e-12), name


def test_intervals_are_percentiles_of_the_bootstrap():
    labels, probabilities = example(80, 3)
    found, resampled = ends(labels, probabilities), intervals.bootstrap(predictions(labels, probabilities).compute, 80)
    for name in resampled.keys() - {"accuracy", "calibration_error"}:
        assert found[name] == pytest.approx(np.percentile(resampled[name], [2.5, 97.5]), abs=1e-12), name
    right = int(sum(probabilities.argmax(1) == labels))
    assert found["accuracy"] == pytest.approx(binomtest(right, 80).proportion_ci(method="wilson"), abs=1e-12)
    assert "calibration_error" not in found  # resampling adds to its bias


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_every_interval_holds_its_value(data):
    """With few examples too, absent classes, equal probabilities, and confident models."""
    n, classes = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 7))
    row = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 30.0]), min_size=classes, max_size=classes)
    probabilities = np.exp(data.draw(st.lists(row, min_size=n, max_size=n)))
    probabilities /= probabilities.sum(1, keepdims=True)
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    found = ends(labels, probabilities)
    resampled = intervals.bootstrap(predictions(labels, probabilities).compute, n)
    for name, value in score(labels, probabilities).items():
        if name in found:
            assert found[name][0] <= value <= found[name][1], name
            assert found[name][1] <= 2 if name == "brier" else found[name][1] <= 1 + 1e-9, name
        else:
            low, high = np.nanpercentile(resampled[name], [2.5, 97.5]) if n > 1 and not np.isnan(value) else (0, 0)
            assert low == high or name == "calibration_error", name


def test_a_perfect_score_has_no_interval_of_no_width():
    """24 of 24 right: accuracy has the Wilson interval, and what all resamples agree on has none."""
    labels = np.arange(24) % 3
    found = intervals.with_intervals(predictions(labels, np.eye(3)[labels]).compute, 24, 3)
    low = binomtest(24, 24).proportion_ci(method="wilson").low
    assert found["accuracy"] == {"value": 1, "low": pytest.approx(low), "high": 1}
    assert found["macro_f1"] == found["auc"] == {"value": 1}

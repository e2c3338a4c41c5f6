"""Regression scores, against scikit-learn."""

import numpy as np
import pytest
import sklearn.metrics

from imgclf_jax.scores import classification as scores
from imgclf_jax.scores.regression import RegressionScores


def drawn(n=200, outputs=3):
    rng = np.random.default_rng(outputs)
    targets = (rng.normal(0, 1, (n, outputs)) * np.geomspace(0.01, 100, outputs) + 1000).astype(np.float32)
    return targets, (targets + rng.normal(0, 0.3, targets.shape) * targets.std(0)).astype(np.float32)


def of_all(targets, values, names=()):
    found = RegressionScores(targets, values, names).compute(np.ones((1, len(targets))))
    return {name: float(value[0]) for name, value in found.items()}


@pytest.mark.parametrize("outputs", [1, 3])
def test_scores_are_scikit_learns(outputs):
    """On float32 numbers with a large mean, whose float32 sums of squares have no correct digit."""
    targets, values = drawn(outputs=outputs)
    names = ("small", "middle", "large")[:outputs]
    found = of_all(targets, values, names)
    exact = targets.astype(np.float64), values.astype(np.float64)
    scores = {"r2": sklearn.metrics.r2_score, "mae": sklearn.metrics.mean_absolute_error,
              "rmse": sklearn.metrics.root_mean_squared_error}  # fmt: skip
    expected = {name: score(*exact) for name, score in scores.items()}
    for name, score in scores.items() if outputs > 1 else ():
        each = score(*exact, multioutput="raw_values")
        expected |= {f"{name}[{of}]": value for of, value in zip(names, each, strict=True)}
    assert found == {name: pytest.approx(value, rel=1e-12) for name, value in expected.items()}


def test_weights_of_examples_are_repetitions():
    targets, values = drawn(40)
    counts = np.random.default_rng(0).integers(0, 4, 40)
    weighted = RegressionScores(targets, values).compute(counts[None].astype(np.float64))
    repeated = of_all(targets.repeat(counts, 0), values.repeat(counts, 0))
    assert {name: float(value[0]) for name, value in weighted.items()} == pytest.approx(repeated, rel=1e-9)


def test_r2_of_equal_targets_is_not_known():
    targets = np.full((5, 1), 0.1, np.float32)
    found = of_all(targets, targets + np.float32(0.5))
    assert np.isnan(found["r2"])
    assert found["mae"] == pytest.approx(0.5, rel=1e-6)
    assert np.isnan(of_all(*drawn(1, 1))["r2"])


def test_the_interval_of_a_mean_error_is_that_of_its_standard_error():
    """For a mean, the percentile bootstrap is close to 1.96 standard errors on each side."""
    targets, values = drawn(outputs=1)
    found = scores.with_bootstrap(RegressionScores(targets, values).compute, len(targets), targets.size)["mae"]
    error = np.abs(targets.astype(np.float64) - values)
    half = 1.96 * error.std() / len(error) ** 0.5
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.1)

"""What `evaluate` says of each class and example, its files read back, and confidence intervals of its scores."""

import csv
import json

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from scored import by_sklearn, example, predictions, score
from test_metrics import BROKEN, broken, predicted

from imgclf_jax import losses
from imgclf_jax.scores.multilabel import TargetPredictions
from imgclf_jax.tools.evaluate import by_class, intervals, listing


@pytest.mark.parametrize("kind", BROKEN)
def test_what_a_broken_model_gives_is_counted_for_no_class(kind):
    counts, others = (by_class.counts(predicted(*given)) for given in broken(kind))
    for name in ("predicted", "correct", "confusion"):
        np.testing.assert_array_equal(counts[name], others[name])
    assert counts["examples"].tolist() == [2] * 7


def test_the_class_of_an_example_is_that_of_its_logits():
    """The order of which float32 probabilities may lose: the sigmoid of 20 and of 30 is 1."""
    logits = np.float32([[20, 30, 40, 50, 60, 70, 80]] * 2)
    logits[1] = np.nan
    rows = listing.rows("test", "ab", predicted(logits, np.arange(2), losses.SIGMOID), "0123456", 1)
    assert [(row["class_1"], row["correct"]) for row in rows] == [("6", False), ("0", False)]


def test_the_best_threshold_is_that_of_the_greatest_f1():
    rng = np.random.default_rng(7)
    targets = (rng.random((100, 7)) < np.linspace(0.05, 0.8, 7)).astype(np.float32)
    probabilities = np.float32(np.round(0.5 * rng.random((100, 7)) + 0.35 * targets + 0.05, 2))
    for c, threshold in enumerate(by_class.best_thresholds(TargetPredictions(targets, probabilities, probabilities))):
        of, own = targets[:, c], probabilities[:, c]
        scores = [sklearn.metrics.f1_score(of, own >= t) for t in np.unique(own)]
        assert sklearn.metrics.f1_score(of, own >= threshold) == max(scores)


CLASSES = ("cat, tame", 'dog "big"', "é\udcff")  # a folder's name may hold any bytes
EXPECTED = [
    {"set": "test", "example": "a b.png", "label": r"é\udcff", "correct": True, "class_1": r"é\udcff",
     "probability_1": 0.5, "class_2": "cat, tame", "probability_2": 0.25, "step": 7},
    {"set": "test", "example": "1", "label": "cat, tame", "correct": False, "class_1": 'dog "big"',
     "probability_1": 0.75, "class_2": "cat, tame", "probability_2": 0.125, "step": 7},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_what_is_written_is_read_back(tmp_path, kind):
    file = tmp_path / f"predictions.{kind}"
    probabilities = np.array([[0.25, 0.25, 0.5], [0.125, 0.75, 0.125]], np.float32)
    made = predictions(np.array([2, 0]), probabilities)
    listing.write(file, list(listing.rows("test", ["a b.png", "1"], made, CLASSES, 2, 7)))
    if kind == "csv":
        with file.open(newline="", encoding="utf-8") as stream:
            assert list(csv.DictReader(stream)) == [{k: str(v) for k, v in row.items()} for row in EXPECTED]
    else:
        assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == EXPECTED


def test_a_model_that_predicts_nan_is_written_as_json(tmp_path):
    """JSON has no NaN, which strict readers refuse: it is null, as in --format=json."""
    file, made = tmp_path / "predictions.jsonl", predictions(np.array([2]), np.full((1, 3), np.nan))
    listing.write(file, list(listing.rows("test", ["a"], made, CLASSES, 1)))
    (line,) = file.read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["probability_1"] is None


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

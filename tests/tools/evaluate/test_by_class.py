"""What `evaluate` says of each class and of each example; files of predictions, read back by other readers."""

import csv
import json

import numpy as np
import pytest
import sklearn.metrics
from scored import predictions
from test_metrics import BROKEN, predicted

from imgclf_jax import losses
from imgclf_jax.scores.multilabel import TargetPredictions
from imgclf_jax.tools.evaluate import by_class, listing


@pytest.mark.parametrize("kind", BROKEN)
def test_what_a_broken_model_gives_is_counted_for_no_class(kind):
    logits = np.random.default_rng(0).normal(size=(14, 7)).astype(np.float32)
    labels, bad = np.arange(14) % 7, np.arange(14) < 7  # one of each class
    some = np.stack([BROKEN[kind](row) if b else row for row, b in zip(logits, bad, strict=True)])
    counts, others = (by_class.counts(predicted(*given)) for given in ((some, labels), (logits[~bad], labels[~bad])))
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
        scores = [sklearn.metrics.f1_score(targets[:, c], probabilities[:, c] >= t) for t in probabilities[:, c]]
        assert sklearn.metrics.f1_score(targets[:, c], probabilities[:, c] >= threshold) == max(scores)


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

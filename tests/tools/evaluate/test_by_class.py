"""What `evaluate` says of each class and of each example."""

import numpy as np
import pytest
import sklearn.metrics
from test_metrics import BROKEN, predicted

from imgclf_jax import losses
from imgclf_jax.scores.multilabel import TargetPredictions
from imgclf_jax.tools.evaluate import by_class, listing


def test_ties_are_won_by_the_first_class():
    logits = np.zeros((4, 3), np.float32)
    logits[3] = [0, 1, 1]
    expected = [[1, 0, 0], [1, 0, 0], [1, 1, 0]]
    np.testing.assert_array_equal(by_class.counts(predicted(logits, [0, 1, 2, 2]))["confusion"], expected)


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

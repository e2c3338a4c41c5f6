"""Multi-label scores, against scikit-learn."""

import numpy as np
import pytest
import sklearn.metrics

from imgclf_jax.core.errors import UserError
from imgclf_jax.scores import multilabel
from imgclf_jax.scores.multilabel import TargetPredictions


def drawn(n=300, decimals=2):
    """0/1 targets of seven classes of unequal frequency, and probabilities f32 with ties."""
    rng = np.random.default_rng(7)
    targets = (rng.random((n, 7)) < np.linspace(0.05, 0.8, 7)).astype(np.float32)
    raw = np.round(0.5 * rng.random((n, 7)) + 0.35 * targets + 0.05, decimals)
    return targets, raw.astype(np.float32)


def predictions(targets, probabilities, ranking=None):
    return TargetPredictions(targets, probabilities, probabilities if ranking is None else ranking)


def of_all(targets, probabilities, ranking=None, weights=1.0):
    found = predictions(targets, probabilities, ranking).compute(weights * np.ones((1, len(targets))))
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
    assert multilabel.auc(predictions(targets, probabilities)) == pytest.approx(area, abs=1e-12)


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
        found = multilabel.f1(predictions(targets, probabilities), thresholds, average)
        assert found == pytest.approx(sklearn.metrics.f1_score(targets, predicted, average=average), abs=1e-12)
    for wrong in ({"threshold": (0.5, 0.5)}, {"threshold": "a"}, {"average": "weighted"}):
        with pytest.raises(UserError, match=r"threshold must be a number or 7 of them, one per class, and average 'ma"):
            multilabel.f1(predictions(targets, probabilities), **wrong)

"""Accuracy by confidence: the bins of a reliability diagram (DeGroot and Fienberg 1983, Guo et al. 2017)."""

from typing import NamedTuple

import numpy as np

from imgclf_jax.scores.classification import BINS, confidence_bins


class Reliability(NamedTuple):
    """The examples in each bin of confidence, and their means, NaN for an empty bin."""

    examples: np.ndarray  # i64[bins]
    confidence: np.ndarray  # f64[bins]: the mean probability of the predicted class
    accuracy: np.ndarray  # f64[bins]


def bin_by_confidence(confidence: np.ndarray, correct: np.ndarray) -> Reliability:
    """Bins predictions, without those that are NaN; confidence f64[n], correct bool[n].

    The bins are those of the calibration error.
    """
    known = ~np.isnan(confidence)
    bins = confidence_bins(confidence[known])
    count, *sums = (np.bincount(bins, weights, BINS) for weights in (None, confidence[known], correct[known]))
    with np.errstate(invalid="ignore"):
        return Reliability(count, *(total / count for total in sums))

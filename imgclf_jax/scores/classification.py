"""Predictions of classes for a whole evaluation set, and their scores, in NumPy.

Every score is a function of example weights, so that a bootstrap can pass the counts of its resamples.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from imgclf_jax.core.typing import Array

BINS = 15  # of calibration, as in Guo et al. 2017


def predicted_classes(values: Array) -> Array:
    """int[..., n]: the argmax over NumPy or JAX logits or probabilities [..., n, classes].

    The first class wins a tie. A NaN or infinite maximum is no prediction, -1.
    """
    xp = values.__array_namespace__()
    return xp.where(xp.isfinite(xp.max(values, axis=-1)), xp.argmax(values, axis=-1), -1)


def label_ranks(values: Array, labels: Array) -> Array:
    """int[..., n]: how many classes rank before the label int[n] in logits or probabilities [..., n, classes].

    The first of equal values ranks first, so rank 0 is a correct prediction. Without a prediction (see
    `predicted_classes`) the rank is the number of classes.
    """
    xp, classes = values.__array_namespace__(), values.shape[-1]
    is_label = xp.arange(classes) == labels[:, None]  # [n, classes]
    own = xp.max(xp.where(is_label, values, -xp.inf), axis=-1, keepdims=True)
    before = (values > own) | ((values == own) & (xp.arange(classes) < labels[:, None]))
    return xp.where(xp.isfinite(xp.max(values, axis=-1)), xp.sum(before, axis=-1), classes)


class Predictions(NamedTuple):
    """A model's predictions of n examples, and their scores.

    With several seeds all but the labels and the mask are [seeds + 1, n, …], the ensemble last. Examples without a
    prediction are wrong, and make Brier score, calibration and AUC NaN.
    """

    labels: Array  # i32[n], from 0 to classes - 1
    probabilities: Array  # f32[n, classes]
    predicted: Array  # i32[n], of the logits: float32 rounds probabilities of distinct large logits to equal ones
    ranks: Array  # i32[n], of the label among the logits: see `label_ranks`
    log_odds: Array  # f32[n, classes], see `losses.Link`; they order the examples
    mask: Array | None = None  # bool[n], False for padding; None without padding

    def for_seed(self, i: int) -> "Predictions":
        """The predictions of one of several seeds, or of their ensemble, -1."""
        per_seed = ("probabilities", "predicted", "ranks", "log_odds")
        return self._replace(**{name: getattr(self, name)[i] for name in per_seed})

    def compute(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns {name: f64[r]} for example weights f64[r, n], such as counts in a bootstrap sample.

        - `accuracy`; with six or more classes `top5`
        - `macro_precision`, `macro_recall`, `macro_f1`: means over the classes that are labels or predictions; 0 for a
          class without predictions or labels, as in scikit-learn
        - `auc`: one-vs-rest, the mean over the classes that some but not all examples have; of two classes the second's
        - `brier`: the mean squared distance from the probabilities to the one-hot label (Brier 1950), from 0 to 2;
          half of it for two classes
        - `calibration_error`: the expected calibration error over 15 bins of confidence, weighted by examples (Naeini
          et al. 2015, Guo et al. 2017, arXiv:1706.04599). It is biased upwards on few examples.
        """
        classes, total = self.probabilities.shape[1], weights.sum(1)
        probabilities = np.asarray(self.probabilities, np.float64)
        confidence = probabilities.max(1)
        own = np.take_along_axis(probabilities, self.labels[:, None], 1)[:, 0]
        squares = (probabilities**2).sum(1) - 2 * own + 1
        gaps = _sum_groups(confidence_bins(confidence), weights * (confidence - (self.ranks == 0)), BINS)
        labelled, predicted, correct = self.class_counts(weights)
        present = labelled + predicted > 0
        scores = {
            "accuracy": weights @ (self.ranks == 0) / total,
            "top5": weights @ (self.ranks < 5) / total,
            "macro_precision": _mean_quotient(correct, predicted, present),
            "macro_recall": _mean_quotient(correct, labelled, present),
            "macro_f1": _mean_quotient(2 * correct, labelled + predicted, present),
            "auc": self.auc(weights),
            "brier": weights @ squares / total / (2 if classes == 2 else 1),
            "calibration_error": np.abs(gaps).sum(1) / total,
        }
        return {name: value for name, value in scores.items() if name != "top5" or classes > 5}

    def class_counts(self, weights: np.ndarray) -> np.ndarray:
        """f64[3, r, classes]: the weight of each class among the labels, the predictions, and the correct ones."""
        groups = self.labels, self.predicted, np.where(self.ranks == 0, self.labels, -1)
        return np.stack([_sum_groups(group, weights, self.probabilities.shape[1]) for group in groups])

    def auc(self, weights: np.ndarray) -> np.ndarray:
        """f64[r]: the area under the ROC curve of the second of two classes, else the one-vs-rest mean over all.

        The mean skips classes that no example or every example has. NaN if none is left or a probability is NaN.
        """
        if np.isnan(self.probabilities).any():
            return np.full(len(weights), np.nan)
        classes = [1] if self.log_odds.shape[1] == 2 else range(self.log_odds.shape[1])
        areas = np.stack([roc_area(self.log_odds[:, c], self.labels == c, weights) for c in classes])
        known = ~np.isnan(areas)
        with np.errstate(invalid="ignore"):
            return np.where(known, areas, 0.0).sum(0) / known.sum(0)


def roc_area(values: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """f64[r]: the area under the ROC curve of one class; NaN where no example or every example is positive.

    values [n] rank the examples, positive bool[n], weights f64[r, n]. It is the Mann-Whitney U: for each positive
    example, the weight below its value and half the weight at it.
    """
    order = np.argsort(values, kind="stable")
    up_to = np.pad(np.cumsum(weights[:, order], 1), ((0, 0), (1, 0)))  # f64[r, n + 1]
    first, last = (np.searchsorted(values[order], values[positive], side) for side in ("left", "right"))
    own = weights[:, positive]
    total, rest = own.sum(1), weights[:, ~positive].sum(1)
    # Positives count among themselves too, which adds half of their squared weight.
    pairs = (own * (up_to[:, first] + up_to[:, last])).sum(1) / 2 - total**2 / 2
    return np.divide(pairs, total * rest, out=np.full(len(weights), np.nan), where=total * rest > 0)


def _mean_quotient(numerator: np.ndarray, denominator: np.ndarray, among: np.ndarray) -> np.ndarray:
    """f64[r]: the mean over the classes `among` bool[r, classes]; a quotient by 0 counts as 0."""
    quotient = np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)
    return np.where(among, quotient, 0.0).sum(1) / among.sum(1)


def confidence_bins(confidence: np.ndarray) -> np.ndarray:
    """int[n]: the bin of each confidence in [0, 1]. A bin includes its upper edge, so 1 is in the last."""
    return np.clip(np.ceil(np.nan_to_num(confidence) * BINS).astype(int) - 1, 0, BINS - 1)


def _sum_groups(groups: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """f64[r, count]: the sums of weights f64[r, n] over the examples of each group int[n]; -1 is in no group."""
    return np.stack([np.bincount(groups + 1, row, count + 1)[1:] for row in weights])


def auc(predictions: Predictions) -> float:
    """See `Predictions.auc`."""
    return float(predictions.auc(np.ones((1, len(predictions.labels))))[0])


def balanced_accuracy(predictions: Predictions) -> float:
    """The mean recall over the classes that have examples."""
    labelled, _, correct = predictions.class_counts(np.ones((1, len(predictions.labels))))
    return float(_mean_quotient(correct, labelled, labelled > 0)[0])


def f1(predictions: Predictions) -> float:
    """F1: of the second of two classes, else the mean over the classes that are labels or predictions."""
    labelled, predicted, correct = predictions.class_counts(np.ones((1, len(predictions.labels))))
    among = labelled + predicted > 0 if labelled.shape[1] > 2 else np.array([[False, True]])
    return float(_mean_quotient(2 * correct, labelled + predicted, among)[0])


METRICS: dict[str, Callable[..., float]] = {"auc": auc, "balanced_accuracy": balanced_accuracy, "f1": f1}

"""Multi-label predictions for a whole evaluation set, and their scores, as functions of example weights."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Array
from imgclf_jax.scores.classification import roc_area


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b in float64; NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=b > 0)


def micro_f1(counts: np.ndarray) -> np.ndarray:
    """f64[r]: F1 of all decisions pooled; `counts` are those of `TargetPredictions.counts`."""
    true, predicted, both = counts.sum(2)
    return quotient(2 * both, true + predicted)


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """f64[r]: the mean F1 over the classes that are true or predicted for any example."""
    true, predicted, both = counts
    return _mean(quotient(2 * both, true + predicted))


def _mean(by_class: np.ndarray) -> np.ndarray:
    """f64[r]: the mean over classes, ignoring NaN; NaN if all are."""
    known = ~np.isnan(by_class)
    return quotient(np.where(known, by_class, 0.0).sum(1), known.sum(1).astype(np.float64))


class TargetPredictions(NamedTuple):
    """A model's predictions of n examples, each with any number of true classes, and their scores.

    With several seeds `probabilities` and `ranking` are [seeds + 1, n, k], the ensemble last. A NaN makes its example
    wrong, and average precision and F1 NaN.
    """

    targets: Array  # f32[n, k]: a class is true at 0.5 or above
    probabilities: Array  # f32[n, k]: a class is predicted at 0.5 or above
    ranking: Array  # f32[n, k]: orders the examples as the probabilities do, but without ties by rounding
    mask: Array | None = None  # bool[n], False for padding; None without padding

    def for_seed(self, i: int) -> "TargetPredictions":
        """The predictions of one of several seeds, or of their ensemble, -1."""
        return self._replace(probabilities=self.probabilities[i], ranking=self.ranking[i])

    @property
    def exact(self) -> np.ndarray:
        """bool[n]: whether an example has every class predicted correctly."""
        equal = (self.probabilities >= 0.5) == (self.targets >= 0.5)
        return equal.all(1) & np.isfinite(self.probabilities).all(1)

    def compute(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the SCORES f64[r] by name, for example weights f64[r, n]."""
        return {name: score(self, weights) for name, score in SCORES.items()}

    def counts(self, weights: np.ndarray, threshold: float | Sequence[float] = 0.5) -> np.ndarray:
        """f64[3, r, k]: how often a class is true, is predicted, and both; NaN if a probability is NaN.

        `threshold` is one number or one per class.
        """
        if np.isnan(self.probabilities).any():
            return np.full((3, len(weights), self.targets.shape[1]), np.nan)
        true, predicted = self.targets >= 0.5, self.probabilities >= np.asarray(threshold, self.probabilities.dtype)
        return np.stack([weights @ x.astype(np.float64) for x in (true, predicted, true & predicted)])

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """f64[r, classes]: the mean precision at the rank of each positive example, with ties sharing a rank.

        This is the step-wise area under the precision-recall curve, as in scikit-learn. NaN for a class that no example
        has, which means over classes ignore, and if an output is NaN.
        """
        out = np.full((len(weights), self.targets.shape[1]), np.nan)
        if np.isnan(self.ranking).any():
            return out
        for c in range(out.shape[1]):
            order = np.argsort(-self.ranking[:, c], kind="stable")
            values, ordered = self.ranking[order, c], weights[:, order]  # [n], [r, n]
            ends = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)  # of each run of ties
            predicted = np.cumsum(ordered, 1)[:, ends]
            correct = np.cumsum(ordered * (self.targets[order, c] >= 0.5), 1)[:, ends]
            gained = np.diff(correct, axis=1, prepend=0.0)
            precision = np.divide(correct, predicted, out=np.zeros_like(correct), where=predicted > 0)
            out[:, c] = quotient((gained * precision).sum(1), correct[:, -1])
        return out


# The scores that every multi-label evaluation reports: f64[r] for predictions and example weights f64[r, n].
SCORES: dict[str, Callable[[TargetPredictions, np.ndarray], np.ndarray]] = {
    "mean_average_precision": lambda predictions, weights: _mean(predictions.average_precision(weights)),
    "micro_f1": lambda predictions, weights: micro_f1(predictions.counts(weights)),
    "macro_f1": lambda predictions, weights: macro_f1(predictions.counts(weights)),
    "exact_match": lambda predictions, weights: weights @ predictions.exact / weights.sum(1),
}


def auc(predictions: TargetPredictions) -> float:
    """The mean area under the ROC curve over the classes that some but not all examples have; NaN for NaN outputs."""
    targets, ranking = predictions.targets >= 0.5, predictions.ranking
    if np.isnan(ranking).any():
        return float("nan")
    one = np.ones((1, len(targets)))
    return float(_mean(np.stack([roc_area(ranking[:, c], targets[:, c], one) for c in range(targets.shape[1])], 1))[0])


def f1(predictions: TargetPredictions, threshold: float | Sequence[float] = 0.5, average: str = "macro") -> float:
    """F1 at one threshold or one per class: the mean over classes ('macro') or F1 of all decisions ('micro').

    The mean ignores classes that are neither true nor predicted. Raises UserError for other arguments.
    """
    classes = predictions.targets.shape[1]
    values = threshold if isinstance(threshold, list | tuple) else [threshold] * classes
    numbers = all(isinstance(value, int | float) for value in values)
    if not numbers or len(values) != classes or average not in ("macro", "micro"):
        raise UserError(f"metrics: f1(threshold={threshold}, average={average!r}): threshold must be a number or "
                        f"{classes} of them, one per class, and average 'macro' or 'micro'")  # fmt: skip
    counts = predictions.counts(np.ones((1, len(predictions.targets))), threshold)
    return float((macro_f1 if average == "macro" else micro_f1)(counts)[0])


METRICS: dict[str, Callable[..., float]] = {"auc": auc, "f1": f1}

"""Scores of multi-label predictions, as functions of example weights."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import decimals
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.scores.classification import Scores


class Counts(NamedTuple):
    """The example weight f64[r, classes] of true positives, false positives and false negatives."""

    true_positives: np.ndarray
    false_positives: np.ndarray
    false_negatives: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """f64[r, classes]: NaN for a class that is neither true nor predicted."""
        return _quotient(2 * self.true_positives, self._labelled_and_predicted)

    @property
    def micro_f1(self) -> np.ndarray:
        """f64[r]: F1 of all decisions pooled."""
        return _quotient(2 * self.true_positives.sum(1), self._labelled_and_predicted.sum(1))

    @property
    def macro_f1(self) -> np.ndarray:
        """f64[r]: the mean F1 over the classes that are true or predicted for any example."""
        return _mean(self.f1)

    @property
    def precision(self) -> np.ndarray:
        """f64[r, classes]: NaN for a class that is never predicted."""
        return _quotient(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> np.ndarray:
        """f64[r, classes]: NaN for a class that no example has."""
        return _quotient(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def _labelled_and_predicted(self) -> np.ndarray:
        return 2 * self.true_positives + self.false_positives + self.false_negatives


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=b > 0)


def _mean(by_class: np.ndarray) -> np.ndarray:
    """f64[r]: the mean over classes, ignoring NaN; NaN if all are."""
    known = ~np.isnan(by_class)
    return _quotient(np.where(known, by_class, 0.0).sum(1), known.sum(1).astype(np.float64))


@dataclasses.dataclass(frozen=True, eq=False)
class MultilabelScores:
    """Scores of n examples, each with any number of true classes.

    - `targets` f32[n, classes]: a class is true at 0.5 or above.
    - `probabilities` f32[n, classes]: a class is predicted at its threshold or above.
    - `ranking` f32[n, classes] orders the examples of a class, by default the probabilities. Logits break their ties by
      rounding.
    - `thresholds`: one number, or one per class.

    A NaN makes its example wrong, and average precision and F1 NaN.
    """

    targets: np.ndarray
    probabilities: np.ndarray
    ranking: np.ndarray | None = None
    thresholds: float | np.ndarray = 0.5

    @functools.cached_property
    def true(self) -> np.ndarray:
        """bool[n, classes]: the classes that an example has."""
        return self.targets >= 0.5

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """bool[n, classes]."""
        return self.probabilities >= np.asarray(self.thresholds, self.probabilities.dtype)

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """bool[n]: whether an example has every class predicted correctly."""
        return np.all(self.predicted == self.true, 1) & np.isfinite(self.probabilities).all(1)

    def compute(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `mean_average_precision`, `micro_f1`, `macro_f1` and `exact_match` f64[r], by name.

        `weights` f64[r, n] are the weights of the examples.
        """
        counts = self.counts(weights)
        return {
            "mean_average_precision": _mean(self.average_precision(weights)),
            "micro_f1": counts.micro_f1,
            "macro_f1": counts.macro_f1,
            "exact_match": weights @ self.exact / weights.sum(1),
        }

    def counts(self, weights: np.ndarray) -> Counts:
        """The decisions by class; NaN if a probability is NaN."""
        if np.isnan(self.probabilities).any():
            return Counts(*np.full((3, len(weights), self.targets.shape[1]), np.nan))
        both, true, predicted = (weights @ x.astype(np.float64)
                                 for x in (self.true & self.predicted, self.true, self.predicted))  # fmt: skip
        return Counts(both, predicted - both, true - both)

    @functools.cached_property
    def _orders(self) -> np.ndarray:
        """i64[n, classes]: the examples in descending order of each class."""
        return np.argsort(-self._ranking, axis=0, kind="stable")

    @property
    def _ranking(self) -> np.ndarray:
        return self.probabilities if self.ranking is None else self.ranking

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """f64[r, classes]: the mean precision at the rank of each positive example, with ties sharing a rank.

        This is the step-wise area under the precision-recall curve, as in scikit-learn. NaN for a class that no example
        has, which means over classes ignore, and if an output is NaN.
        """
        out = np.full((len(weights), self.targets.shape[1]), np.nan)
        if np.isnan(self._ranking).any():
            return out
        for c in range(out.shape[1]):
            order = self._orders[:, c]
            values = self._ranking[order, c]
            ends = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)  # of each run of ties
            ordered = weights[:, order]  # [r, n]
            predicted = np.cumsum(ordered, 1)[:, ends]
            correct = np.cumsum(ordered * self.true[order, c], 1)[:, ends]
            gained = np.diff(correct, axis=1, prepend=0.0)
            precision = np.divide(correct, predicted, out=np.zeros_like(correct), where=predicted > 0)
            out[:, c] = _quotient((gained * precision).sum(1), correct[:, -1])
        return out

    def reliability(self, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The examples, mean probability and true share [10] of class c, in ten bins of its probability."""
        values = self.probabilities[:, c].astype(np.float64)
        known = ~np.isnan(values)
        bins = np.clip(np.ceil(values[known] * 10).astype(int) - 1, 0, 9)
        count, mean, true = (np.bincount(bins, weights, 10) for weights in (None, values[known], self.true[known, c]))
        return count, _quotient(mean, count), _quotient(true, count)

    def best_thresholds(self) -> np.ndarray:
        """f64[classes]: the threshold with the greatest F1 on these examples; NaN for a class that no example has.

        Choose thresholds on a validation set: on the test set they are biased.
        """
        out = np.full(self.targets.shape[1], np.nan)
        if np.isnan(self.probabilities).any():
            return out
        for c in np.flatnonzero(self.true.any(0)):
            order = np.argsort(-self.probabilities[:, c], kind="stable")
            values, correct = self.probabilities[order, c], np.cumsum(self.true[order, c])
            ends = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
            f1 = 2 * correct[ends] / (ends + 1 + correct[-1])
            out[c] = values[ends[np.argmax(f1)]]
        return out


def by_class(scores: MultilabelScores, names: Sequence[str]) -> list[JsonObject]:
    """Returns a dict per class: examples, average precision, precision, recall, F1 and best threshold.

    Unknown values, such as the recall of a class that no example has, are None.
    """
    one = np.ones((1, len(scores.targets)))
    counts = scores.counts(one)
    columns = {
        "average_precision": scores.average_precision(one)[0], "precision": counts.precision[0],
        "recall": counts.recall[0], "f1": counts.f1[0], "best_threshold": scores.best_thresholds(),
    }  # fmt: skip
    return [
        {"class": name, "examples": int(scores.true[:, i].sum())}
        | {key: None if np.isnan(values[i]) else float(values[i]) for key, values in columns.items()}
        for i, name in enumerate(names)
    ]


THRESHOLD_NOTE = ("Precision, recall and F1 are at a threshold of 0.5. The best threshold has the greatest F1 on these "
                  "very examples; choose it on a validation set.")  # fmt: skip


def table(scores: MultilabelScores, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Returns the column names and a row per class: see `by_class`."""
    columns = ["class", "examples", "average precision", "precision", "recall", "F1", "best threshold"]
    rows = [["" if value is None else decimals(value) if isinstance(value, float) else str(value)
             for value in one.values()] for one in by_class(scores, names)]  # fmt: skip
    return columns, rows


def auc(targets: np.ndarray, probabilities: np.ndarray, ranking: np.ndarray | None = None) -> float:
    """The mean area under the ROC curve over the classes that some but not all examples have.

    targets, probabilities f32[n, classes]. NaN if a probability is NaN.
    """
    values = np.asarray(probabilities if ranking is None else ranking, np.float64)
    if np.isnan(values).any():
        return float("nan")
    classes = [Scores((targets[:, c] >= 0.5).astype(np.int32), np.stack([-values[:, c], values[:, c]], 1))
               for c in range(values.shape[1])]  # fmt: skip
    areas = np.array([[one.auc(np.ones((1, len(targets))))[0] for one in classes]])
    return float(_mean(areas)[0])


def f1(
    targets: np.ndarray, probabilities: np.ndarray, ranking: np.ndarray | None = None,
    threshold: float | Sequence[float] = 0.5, average: str = "macro",
) -> float:  # fmt: skip
    """F1 at one threshold or one per class: the mean over classes ('macro') or F1 of all decisions ('micro').

    targets, probabilities f32[n, classes]. The mean ignores classes that are neither true nor predicted.
    """
    thresholds = check_f1(targets.shape[1], threshold, average)
    counts = MultilabelScores(targets, probabilities, thresholds=thresholds).counts(np.ones((1, len(targets))))
    return float((counts.macro_f1 if average == "macro" else counts.micro_f1)[0])


def check_f1(classes: int, threshold: float | Sequence[float] = 0.5, average: str = "macro") -> np.ndarray:
    """Returns the thresholds of `f1`, f64[] or f64[classes]. Raises UserError for arguments that it does not take."""
    values = threshold if isinstance(threshold, list | tuple) else np.ravel(threshold).tolist()
    numbers = all(isinstance(value, int | float | np.number) for value in values)
    if not numbers or np.shape(threshold) not in ((), (classes,)) or average not in ("macro", "micro"):
        raise UserError(f"f1(threshold={threshold}, average={average!r}): threshold must be a number or {classes} of "
                        "them, one per class, and average 'macro' or 'micro'")  # fmt: skip
    return np.asarray(threshold, np.float64)


METRICS: dict[str, Callable[..., float]] = {"auc": auc, "f1": f1}

"""Scores of predictions of several labels an example, as functions of weights of the examples: see `scores`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from imgclf_jax.core.errors import UserError
from imgclf_jax.scores.classification import Scores


class Counts(NamedTuple):
    """The weight of each class's true positives, false positives and false negatives: f64[r, classes]."""

    true_positives: np.ndarray
    false_positives: np.ndarray
    false_negatives: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """f64[r, classes]: NaN for a class that is neither true nor predicted."""
        return _quotient(2 * self.true_positives, self._labelled_and_predicted)

    @property
    def micro_f1(self) -> np.ndarray:
        """f64[r]: F1 of all decisions together."""
        return _quotient(2 * self.true_positives.sum(1), self._labelled_and_predicted.sum(1))

    @property
    def macro_f1(self) -> np.ndarray:
        """f64[r]: the mean over the classes that are true or predicted at all."""
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
    """f64[r]: the mean over the classes that are not NaN; NaN if all are."""
    known = ~np.isnan(by_class)
    return _quotient(np.where(known, by_class, 0.0).sum(1), known.sum(1).astype(np.float64))


@dataclasses.dataclass(frozen=True, eq=False)
class MultilabelScores:
    """Scores of n examples with any number of `classes` each.

    targets f32[n, classes]: a class is true from 0.5 on. probabilities f32[n, classes]: a class is predicted from its
    threshold on; `thresholds` is one number or one for each class. `ranking` f32[n, classes] orders the examples of a
    class as the probabilities do, which may be equal where logits are not; None for the probabilities themselves. An
    example with NaN predicts nothing right; average precision and F1 are NaN with it.
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
        """bool[n]: whether all classes of an example are decided right."""
        return np.all(self.predicted == self.true, 1) & np.isfinite(self.probabilities).all(1)

    def of(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """{name: f64[r]} for weights f64[r, n] of the examples: `mean_average_precision`, `micro_f1`, `macro_f1`,
        `exact_match`.
        """
        counts = self.counts(weights)
        return {
            "mean_average_precision": _mean(self.average_precision(weights)),
            "micro_f1": counts.micro_f1,
            "macro_f1": counts.macro_f1,
            "exact_match": weights @ self.exact / weights.sum(1),
        }

    def counts(self, weights: np.ndarray) -> Counts:
        """The decisions by class; NaN if an output is NaN."""
        if np.isnan(self.probabilities).any():
            return Counts(*np.full((3, len(weights), self.targets.shape[1]), np.nan))
        both, own, found = (weights @ x.astype(np.float64)
                            for x in (self.true & self.predicted, self.true, self.predicted))  # fmt: skip
        return Counts(both, found - both, own - both)

    @functools.cached_property
    def _orders(self) -> np.ndarray:
        """i64[n, classes]: the examples of each class by their rank, the first the most certain."""
        return np.argsort(-self._ranking, axis=0, kind="stable")

    @property
    def _ranking(self) -> np.ndarray:
        return self.probabilities if self.ranking is None else self.ranking

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """f64[r, classes]: the mean over a class's examples of the precision at their rank, ties ranking together.

        That is the area under steps of the curve of precision over recall, as scikit-learn has it. NaN for a class
        that no example has, which means over the classes leave out, and if an output is NaN.
        """
        out = np.full((len(weights), self.targets.shape[1]), np.nan)
        if np.isnan(self._ranking).any():
            return out
        for c in range(out.shape[1]):
            order = self._orders[:, c]
            values = self._ranking[order, c]
            ends = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)  # of each run of ties
            ordered = weights[:, order]  # [r, n]
            found = np.cumsum(ordered, 1)[:, ends]
            right = np.cumsum(ordered * self.true[order, c], 1)[:, ends]
            gained = np.diff(right, axis=1, prepend=0.0)
            precision = np.divide(right, found, out=np.zeros_like(right), where=found > 0)
            out[:, c] = _quotient((gained * precision).sum(1), right[:, -1])
        return out

    def reliability(self, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of class c, by ten bins of its probability: examples, mean probability, share with the class; each [10]."""
        values = self.probabilities[:, c].astype(np.float64)
        whole = ~np.isnan(values)
        bins = np.clip(np.ceil(values[whole] * 10).astype(int) - 1, 0, 9)
        count, mean, true = (np.bincount(bins, weights, 10) for weights in (None, values[whole], self.true[whole, c]))
        return count, _quotient(mean, count), _quotient(true, count)

    def best_thresholds(self) -> np.ndarray:
        """f64[classes]: the probability from which each class has its greatest F1 on these examples; NaN without one.

        It is chosen by these examples: to use it, choose it on a validation set.
        """
        out = np.full(self.targets.shape[1], np.nan)
        if np.isnan(self.probabilities).any():
            return out
        for c in np.flatnonzero(self.true.any(0)):
            order = np.argsort(-self.probabilities[:, c], kind="stable")
            values, right = self.probabilities[order, c], np.cumsum(self.true[order, c])
            ends = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
            f1 = 2 * right[ends] / (ends + 1 + right[-1])
            out[c] = values[ends[np.argmax(f1)]]
        return out


def by_class(scores: MultilabelScores, names: Sequence[str]) -> list[dict[str, Any]]:
    """A dict for each class: its examples, average precision, the decisions at the threshold, the best threshold.

    What is not known, such as the recall of a class that no example has, is None.
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


ON_THRESHOLDS = ("Precision, recall and F1 are at a threshold of 0.5. The best threshold has the greatest F1 on these "
                 "very examples: choose it on a validation set.")  # fmt: skip


def table(scores: MultilabelScores, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The columns, and a row for each class: see `by_class`."""
    columns = ["class", "examples", "average precision", "precision", "recall", "F1", "best threshold"]
    rows = [["" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
             for value in one.values()] for one in by_class(scores, names)]  # fmt: skip
    return columns, rows


def auc(targets: np.ndarray, probabilities: np.ndarray, ranking: np.ndarray | None = None) -> float:
    """The mean over the classes of the area under the ROC curve of each; targets, probabilities f32[n, classes].

    Classes that no example has, or every example, are left out. NaN if a probability is NaN.
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
    """F1 at a threshold, or at one for each class; the mean over the classes ('macro') or of all decisions ('micro').

    targets, probabilities f32[n, classes]. A class that is neither true nor predicted is left out of the mean.
    """
    thresholds = np.asarray(threshold, np.float64)
    if average not in ("macro", "micro") or thresholds.shape not in ((), targets.shape[1:]):
        raise UserError(f"f1(threshold={threshold}, average={average!r}): allowed are a threshold or {targets.shape[1]}"
                        " of them, one a class, and the averages 'macro' and 'micro'")  # fmt: skip
    counts = MultilabelScores(targets, probabilities, thresholds=thresholds).counts(np.ones((1, len(targets))))
    return float((counts.macro_f1 if average == "macro" else counts.micro_f1)[0])


METRICS: dict[str, Callable[..., float]] = {"auc": auc, "f1": f1}

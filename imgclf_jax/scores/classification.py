"""Scores of class predictions on a whole evaluation set, with confidence intervals over sets of its size.

Every score is a function of example weights, so a bootstrap is one product with a matrix of weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from imgclf_jax.core.typing import Array

if TYPE_CHECKING:  # imported where it is used, since it is a tenth of the time that a command takes to start
    from scipy import sparse

_PROPORTIONS = ("accuracy", "top5", "exact_match")  # of examples, so their intervals are Wilson's
_BINS = 15  # of calibration, as in Guo et al. 2017
_MAX_WEIGHTS = 1 << 24  # bootstrap weights in memory at a time
_MAX_COST = 2_000_000_000  # weights that the bootstrap of AUC may read: about ten seconds


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


class FromLogits(NamedTuple):
    """What probabilities lose by rounding: distinct logits may have equal probabilities."""

    predicted: Array  # int[n]: see `predicted_classes`
    ranks: Array  # int[n]: see `label_ranks`
    log_odds: Array | None = None  # f32[n, classes]: see `losses.Link`

    def select(self, which: np.ndarray) -> "FromLogits":
        """Those of some of the examples."""
        return FromLogits(*(x if x is None else x[which] for x in self))


class ClassCounts(NamedTuple):
    """The example weight f64[r, classes] of each class as label, as prediction, and as both."""

    labelled: np.ndarray
    predicted: np.ndarray
    correct: np.ndarray

    def mean(self, numerator: np.ndarray, denominator: np.ndarray, among: np.ndarray) -> np.ndarray:
        """f64[r]: the mean quotient over the classes `among` bool[r, classes]; a quotient by 0 counts as 0."""
        quotient = np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)
        return np.where(among, quotient, 0.0).sum(1) / among.sum(1)

    @property
    def present(self) -> np.ndarray:
        """bool[r, classes]: whether a class is the label or prediction of any example."""
        return (self.labelled > 0) | (self.predicted > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """The scores of probabilities [n, classes] for labels int[n] from 0 to classes - 1.

    `from_logits` is known if the logits are. Examples without a prediction are wrong, and make Brier score, calibration
    and AUC NaN.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    from_logits: FromLogits | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "probabilities", np.asarray(self.probabilities, np.float64))

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """int[n]: the predicted class of each example, -1 for none."""
        return self.from_logits.predicted if self.from_logits else predicted_classes(self.probabilities)

    @functools.cached_property
    def ranks(self) -> np.ndarray:
        """int[n]: how many classes rank before the label."""
        return self.from_logits.ranks if self.from_logits else label_ranks(self.probabilities, self.labels)

    @property
    def _ordering(self) -> np.ndarray:
        """[n, classes]: what orders the examples of each class."""
        known = self.from_logits and self.from_logits.log_odds
        return self.probabilities if known is None else known

    def compute(self, weights: np.ndarray, auc: bool = True) -> dict[str, np.ndarray]:
        """Returns {name: f64[r]} for example weights f64[r, n], such as counts in a bootstrap sample.

        - `accuracy`; with six or more classes `top5`
        - `macro_precision`, `macro_recall`, `macro_f1`: means over the classes that are labels or predictions; 0 for a
          class without predictions or labels, as in scikit-learn
        - `auc`: one-vs-rest, the mean over the classes that some but not all examples have; of two classes the second's
        - `brier`: the mean squared distance from the probabilities to the one-hot label (Brier 1950), from 0 to 2;
          half of it for two classes
        - `calibration_error`: the expected calibration error over 15 bins of confidence, weighted by examples (Naeini
          et al. 2015, Guo et al. 2017, arXiv:1706.04599). A bin includes its upper edge, so a confidence of 1 is
          in the last. It is biased upwards on few examples: see `calibration_interval`.
        """
        total = weights.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = {name: weights @ values / total for name, values in self._per_example.items()}
            scores = means | self._macro(weights) | {"calibration_error": self._calibration(weights) / total}
            return scores | ({"auc": self.auc(weights)} if auc else {})

    @functools.cached_property
    def _per_example(self) -> dict[str, np.ndarray]:
        """f64[n]: the scores that are means over examples."""
        classes = self.probabilities.shape[1]
        own = np.take_along_axis(self.probabilities, self.labels[:, None], 1)  # [n, 1]
        squares = (self.probabilities**2).sum(1) - 2 * own[:, 0] + 1
        out = {"accuracy": (self.ranks == 0).astype(float), "brier": squares / 2 if classes == 2 else squares}
        return out | ({"top5": (self.ranks < 5).astype(float)} if classes > 5 else {})

    def class_counts(self, weights: np.ndarray) -> ClassCounts:
        """The counts behind precision, recall and F1, for example weights f64[r, n]."""
        correct = np.where(self.ranks == 0, self.labels, -1)
        return ClassCounts(*(weights @ self._one_hot(classes) for classes in (self.labels, self.predicted, correct)))

    def _macro(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        counts = self.class_counts(weights)
        labelled, predicted, correct = counts
        quotients = {"precision": (correct, predicted), "recall": (correct, labelled),
                     "f1": (2 * correct, labelled + predicted)}  # fmt: skip
        return {f"macro_{name}": counts.mean(*quotient, counts.present) for name, quotient in quotients.items()}

    def _one_hot(self, indices: np.ndarray) -> "sparse.csr_array":
        """[n, classes]: one-hot rows; zeros for -1."""
        rows = np.flatnonzero(indices >= 0)
        return _sparse(np.ones(len(rows)), rows, indices[rows], self.probabilities.shape)

    @property
    def bins(self) -> np.ndarray:
        """int[n]: the calibration bin of each example's confidence."""
        return np.clip(np.ceil(self.probabilities.max(1) * _BINS).astype(int) - 1, 0, _BINS - 1)

    def _calibration(self, weights: np.ndarray) -> np.ndarray:
        confidence = self.probabilities.max(1)
        if np.isnan(confidence).any():
            return np.full(len(weights), np.nan)
        gaps = _sparse(confidence - self._per_example["accuracy"], np.arange(len(self.labels)), self.bins)
        return np.abs(weights @ gaps).sum(1)

    def auc(self, weights: np.ndarray) -> np.ndarray:
        """f64[r]: the area under the ROC curve, as the share of correctly ordered pairs (Mann-Whitney U).

        Ties count half. The mean over one-vs-rest classes skips those that no example or every example has. NaN if no
        class is left or a probability is NaN.
        """
        classes = self.probabilities.shape[1]
        if np.isnan(self.probabilities).any():
            return np.full(len(weights), np.nan)
        areas = []
        # Blocks of 128 samples, [n, 128], so the sums stay in the CPU cache.
        blocks = [np.ascontiguousarray(weights[i : i + 128].T) for i in range(0, len(weights), 128)]
        for c in [1] if classes == 2 else range(classes):
            values, own = self._ordering[:, c], np.flatnonzero(self.labels == c)
            if not 0 < len(own) < len(values):
                continue
            # Mann-Whitney U: for each positive, the weight below its value and half the weight equal to it. Positives
            # count too, which adds half of their squared weight. Only sums at and between positive values are needed.
            edges, index = np.unique(values[own], return_inverse=True)
            between = np.searchsorted(edges, values, "left") + np.searchsorted(edges, values, "right")  # odd: at one
            sums = _scatter_add(between, np.arange(len(values)), (2 * len(edges) + 1, len(values)))
            positives = _scatter_add(index, own, (len(edges), len(values)))
            areas.append(np.concatenate([_area(sums @ block, positives @ block) for block in blocks]))
        if not areas:
            return np.full(len(weights), np.nan)
        stacked = np.stack(areas)  # NaN where a class has no example in a sample
        return np.where(np.isnan(stacked), 0.0, stacked).sum(0) / (~np.isnan(stacked)).sum(0)


def _scatter_add(target: np.ndarray, source: np.ndarray, shape: tuple[int, int]) -> "sparse.csr_array":
    """The matrix m such that m @ x adds row source[i] of x to row target[i]."""
    return _sparse(np.ones(len(target)), target, source, shape)


def _sparse(
    values: np.ndarray, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int] | None = None
) -> "sparse.csr_array":
    """The matrix with `values` at these rows and columns, by default of the smallest shape that has them."""
    from scipy import sparse

    return sparse.csr_array((values, (rows, columns)), shape=shape)


def _area(sums: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """f64[r]: the area under the ROC curve of one class, whose examples have k distinct values.

    - sums f64[2 k + 1, r]: the weight below the first value, at it, between it and the second, and so on.
    - positives f64[k, r]: the weight of the class at each value.
    """
    up_to = np.cumsum(sums, 0)
    total = positives.sum(0)
    pairs = np.einsum("kr,kr->r", positives, up_to[:-1:2] + up_to[1::2]) / 2
    return (pairs - total**2 / 2) / (total * (up_to[-1] - total))


def score(labels: np.ndarray, probabilities: np.ndarray, from_logits: FromLogits | None = None) -> dict[str, float]:
    """The scores with equal weights: see `Scores`."""
    scores = Scores(labels, probabilities, from_logits)
    return {name: float(value[0]) for name, value in scores.compute(np.ones((1, len(labels)))).items()}


def with_intervals(
    labels: np.ndarray, probabilities: np.ndarray, from_logits: FromLogits | None = None, samples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Returns {score: {"value", "low", "high"}} with the ends of its 95 % confidence interval, if known.

    labels int[n], probabilities [n, classes]. The intervals are those of this model over test sets of this size. They
    contain the score, and do not cover the variation over training seeds. Accuracy and top-5 accuracy have the Wilson
    interval, the calibration error `calibration_interval`, and the others the percentile bootstrap (Efron 1979) over
    `samples` resamples, for two examples or more. A NaN score has no interval, nor has AUC if it would take minutes,
    nor a perfect score that is the same on all resamples: these say nothing about other test sets.
    """
    scores = Scores(labels, probabilities, from_logits)
    n, classes = probabilities.shape
    auc = samples * n * classes <= _MAX_COST
    resampled = bootstrap(functools.partial(scores.compute, auc=auc), n, samples, seed)
    values = scores.compute(np.ones((1, n)))
    return _with_ends(values, resampled, n, calibration_error=lambda: calibration_interval(scores))


def with_bootstrap(
    compute: Callable[[np.ndarray], Mapping[str, np.ndarray]], n: int, cost: int
) -> dict[str, dict[str, float]]:
    """As `with_intervals`, for the scores of n examples that `compute` returns as for `bootstrap`.

    `exact_match` has the Wilson interval. `cost` is the number of values that the scores of a sample read: the others
    have no intervals if these would take minutes.
    """
    resampled = bootstrap(compute, n, at_once=_MAX_WEIGHTS // 8) if cost * 1000 <= _MAX_COST else {}
    return _with_ends(compute(np.ones((1, n))), resampled, n)


def _with_ends(
    values: Mapping[str, np.ndarray], resampled: Mapping[str, np.ndarray], n: int,
    **others: Callable[[], tuple[float, float]],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """The scores f64[1] of n examples with the ends of their intervals; `others` return those of a score by name."""
    out = {}
    for name, (value,) in values.items():
        out[name] = {"value": float(value)}
        if np.isnan(value):
            continue
        if name in _PROPORTIONS:
            low, high = wilson_interval(round(value * n), n)
        elif name in others:
            low, high = others[name]()
        elif name in resampled:
            low, high = np.nanpercentile(resampled[name], [2.5, 97.5])  # AUC of a one-class sample is NaN
        else:
            continue
        if low < high:
            out[name] |= {"low": float(min(low, value)), "high": float(max(high, value))}
    return out


def bootstrap(
    compute: Callable[[np.ndarray], Mapping[str, np.ndarray]], n: int, samples: int = 1000, seed: int = 0,
    at_once: int = _MAX_WEIGHTS,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Returns {name: f64[samples]}: the scores of resamples of n examples with replacement; {} for one example.

    `compute(weights f64[r, n])` returns the scores {name: f64[r]}. At most `at_once` weights are in memory.
    """
    chunks: list[Mapping[str, np.ndarray]] = []
    generator = np.random.default_rng(seed)
    while n > 1 and samples > 0:
        size = min(samples, max(1, at_once // n))
        chunks.append(compute(generator.multinomial(n, np.full(n, 1 / n), size).astype(np.float64)))
        samples -= size
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in (chunks[0] if chunks else ())}


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927); its width is above zero for 0 and n successes too."""
    from scipy import stats

    interval = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def calibration_interval(scores: Scores) -> tuple[float, float]:
    """The 95 % confidence interval of the calibration error, by test inversion.

    The calibration error is biased upwards on few examples, since it sums the absolute gaps of the bins, noise
    included. A bootstrap adds that noise a second time, and all of its percentiles may exceed the true error. This
    interval contains every candidate error, the observed gaps times a factor of 0 or more, under which the observed
    error is not extreme, given normal noise in the bins. The variance of that noise is estimated from each bin's
    accuracy, shrunk towards its mean confidence by one example.
    """
    n, bins, confidence = len(scores.labels), scores.bins, scores.probabilities.max(1)
    correct = (scores.ranks == 0).astype(np.float64)

    sums = functools.partial(np.bincount, bins, minlength=_BINS)  # over the examples of each bin
    count, gaps = sums(), sums(confidence - correct) / n
    accuracy = (sums(correct) + sums(confidence) / np.maximum(count, 1)) / (count + 1)
    squares = sums((confidence - accuracy[bins]) ** 2) + count * accuracy * (1 - accuracy)
    deviation = np.sqrt(np.maximum(squares / n - gaps**2, 0) / n)
    error = np.abs(gaps).sum()
    if not error:
        return 0.0, 0.0
    truths = np.linspace(0, error + 5 * np.sqrt((deviation**2).sum()), 61)
    noise = deviation * np.random.default_rng(0).normal(size=(1000, _BINS))
    below = [(np.abs(truth / error * np.abs(gaps) + noise).sum(1) < error).mean() for truth in truths]
    falling = np.minimum.accumulate(below)  # the greater the truth, the rarer an estimate below `error`
    low, high = np.interp([0.975, 0.025], falling[::-1], truths[::-1])
    return float(low), min(1.0, float(high))


class Reliability(NamedTuple):
    """The examples [15] in each confidence bin, and their means, NaN for an empty bin."""

    examples: np.ndarray  # int64
    confidence: np.ndarray  # f64: the mean probability of the predicted class
    accuracy: np.ndarray  # f64


def reliability(labels: np.ndarray, probabilities: np.ndarray, from_logits: FromLogits | None = None) -> Reliability:
    """The reliability diagram (DeGroot and Fienberg 1983, Guo et al. 2017), without examples that hold NaN.

    labels int[n], probabilities [n, classes]. The bins are those of the calibration error: see `Scores.compute`.
    """
    known = ~np.isnan(probabilities).any(1)
    scores = Scores(labels[known], probabilities[known], from_logits and from_logits.select(known))
    count, confidence, correct = (
        np.bincount(scores.bins, weights, _BINS)
        for weights in (None, scores.probabilities.max(1), (scores.ranks == 0).astype(float))
    )
    with np.errstate(invalid="ignore"):
        return Reliability(count, confidence / count, correct / count)

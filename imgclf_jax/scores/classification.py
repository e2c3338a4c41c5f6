"""Scores of a model's predictions on a whole set, and the intervals that other sets of this size would give.

Every score is a function of weights of the examples, so that a bootstrap is a product with a matrix of weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse, special

_BINS = 15  # of calibration, as in Guo et al. 2017
_AT_ONCE = 1 << 24  # weights that are held at once
_MOST_AUC = 2_000_000_000  # so many weights are looked at for intervals of AUC: about ten seconds


def predicted_classes(values: Any) -> Any:
    """int[..., n]: the class of the greatest of logits or probabilities [..., n, classes], of NumPy or of JAX.

    The first class wins a tie. It is -1 where the greatest value is NaN or infinite: there is no prediction.
    """
    xp = values.__array_namespace__()
    return xp.where(xp.isfinite(xp.max(values, axis=-1)), xp.argmax(values, axis=-1), -1)


def label_ranks(values: Any, labels: Any) -> Any:
    """int[..., n]: how many classes rank before the label in logits or probabilities [..., n, classes].

    labels int[n]. Of equal values the first class ranks first, so that 0 is a correct prediction. Where there is no
    prediction, see `predicted_classes`, it is the number of classes.
    """
    xp, classes = values.__array_namespace__(), values.shape[-1]
    is_label = xp.arange(classes) == labels[:, None]  # [n, classes]
    own = xp.max(xp.where(is_label, values, -xp.inf), axis=-1, keepdims=True)
    before = (values > own) | ((values == own) & (xp.arange(classes) < labels[:, None]))
    return xp.where(xp.isfinite(xp.max(values, axis=-1)), xp.sum(before, axis=-1), classes)


Given = tuple[np.ndarray, np.ndarray] | None  # what is predicted by logits: see `Scores`


class ByClass(NamedTuple):
    """How much weight of the examples has each class as its label, as its prediction, and as both: f64[r, classes]."""

    labelled: np.ndarray
    predicted: np.ndarray
    right: np.ndarray

    def mean(self, numerator: np.ndarray, denominator: np.ndarray, among: np.ndarray) -> np.ndarray:
        """f64[r]: the mean of the quotient over the classes `among` bool[r, classes]; 0 where the denominator is."""
        quotient = np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)
        return np.where(among, quotient, 0.0).sum(1) / among.sum(1)

    @property
    def found(self) -> np.ndarray:
        """bool[r, classes]: whether a class is a label or a prediction at all."""
        return (self.labelled > 0) | (self.predicted > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """The scores of probabilities [n, classes] for labels int[n], each 0 to classes - 1.

    `given` are `predicted_classes` and `label_ranks` of the logits, int[n] each, where logits are known: probabilities
    may be equal where logits are not. Examples without a prediction are wrong, and Brier score, calibration and AUC are
    NaN with them.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    given: Given = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "probabilities", np.asarray(self.probabilities, np.float64))

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """int[n]: the predicted class of each example, -1 for none."""
        return self.given[0] if self.given else predicted_classes(self.probabilities)

    @functools.cached_property
    def ranks(self) -> np.ndarray:
        """int[n]: how many classes rank before the label."""
        return self.given[1] if self.given else label_ranks(self.probabilities, self.labels)

    def of(self, weights: np.ndarray, auc: bool = True) -> dict[str, np.ndarray]:
        """{name: f64[r]} for weights f64[r, n] of the examples, such as how often each is in a sample.

        - `accuracy`; `top5`, from six classes on
        - `macro_precision`, `macro_recall`, `macro_f1`: means over the classes that are a label or are predicted;
          0 for a class without predictions or labels, as scikit-learn has it
        - `auc`: of each class against all others, the mean over those that are the label of some examples and not of
          all; of two classes the second's
        - `brier`: the mean squared distance of the probabilities to those of the label (Brier 1950), from 0 to 2; of
          two classes half of it
        - `calibration_error`: of 15 bins by confidence, the mean distance between confidence and accuracy, weighted by
          examples (Naeini et al. 2015, Guo et al. 2017, arXiv:1706.04599). A bin holds its upper edge, so that a
          confidence of 1 belongs to the last one. Few examples make it too large: see `calibration_interval`.
        """
        total = weights.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = {name: weights @ values / total for name, values in self._of_each.items()}
            scores = means | self._macro(weights) | {"calibration_error": self._calibration(weights) / total}
            return scores | ({"auc": self.auc(weights)} if auc else {})

    @functools.cached_property
    def _of_each(self) -> dict[str, np.ndarray]:
        """Scores that are means over the examples: f64[n]."""
        classes = self.probabilities.shape[1]
        own = np.take_along_axis(self.probabilities, self.labels[:, None], 1)  # [n, 1]
        squares = (self.probabilities**2).sum(1) - 2 * own[:, 0] + 1
        out = {"accuracy": (self.ranks == 0).astype(float), "brier": squares / 2 if classes == 2 else squares}
        return out | ({"top5": (self.ranks < 5).astype(float)} if classes > 5 else {})

    def by_class(self, weights: np.ndarray) -> ByClass:
        """The counts that precision, recall and F1 come from, for weights f64[r, n] of the examples."""
        right = np.where(self.ranks == 0, self.labels, -1)
        return ByClass(*(weights @ self._columns(numbers) for numbers in (self.labels, self.predicted, right)))

    def _macro(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        by_class = self.by_class(weights)
        labelled, predicted, right = by_class
        denominators = {"precision": (right, predicted), "recall": (right, labelled),
                        "f1": (2 * right, labelled + predicted)}  # fmt: skip
        return {f"macro_{name}": by_class.mean(*pair, by_class.found) for name, pair in denominators.items()}

    def _columns(self, numbers: np.ndarray) -> sparse.csr_array:
        """[n, classes]: 1 where the example has this number; a row of zeros for -1."""
        n, classes = self.probabilities.shape
        here = np.flatnonzero(numbers >= 0)
        return sparse.csr_array((np.ones(len(here)), (here, numbers[here])), shape=(n, classes))

    @property
    def bins(self) -> np.ndarray:
        """int[n]: the bin of calibration that the example's confidence lies in."""
        return np.clip(np.ceil(self.probabilities.max(1) * _BINS).astype(int) - 1, 0, _BINS - 1)

    def _calibration(self, weights: np.ndarray) -> np.ndarray:
        confidence = self.probabilities.max(1)
        if np.isnan(confidence).any():
            return np.full(len(weights), np.nan)
        each = sparse.csr_array((confidence - self._of_each["accuracy"], (np.arange(len(self.labels)), self.bins)))
        return np.abs(weights @ each).sum(1)

    def auc(self, weights: np.ndarray) -> np.ndarray:
        """f64[r]: by the share of pairs of an example of the class and one of another that are in order.

        Ties count half. Left out of the mean are classes that no example has as its label, or every example. NaN if no
        class is left, and if a probability is NaN.
        """
        classes = self.probabilities.shape[1]
        if np.isnan(self.probabilities).any():
            return np.full(len(weights), np.nan)
        areas = []
        # In parts of few samples, [n, 128]: what is summed stays in the processor's cache.
        parts = [np.ascontiguousarray(weights[i : i + 128].T) for i in range(0, len(weights), 128)]
        for c in [1] if classes == 2 else range(classes):
            values, own = self.probabilities[:, c], np.flatnonzero(self.labels == c)
            if not 0 < len(own) < len(values):
                continue
            # The weight of what is below each value of the class, and half of what is equal: of the class itself
            # too, which in all is half of its square. Only sums between and at the class's values are needed.
            edges, place = np.unique(values[own], return_inverse=True)
            between = np.searchsorted(edges, values, "left") + np.searchsorted(edges, values, "right")  # odd: at one
            sums = _sums(between, np.arange(len(values)), (2 * len(edges) + 1, len(values)))
            of_class = _sums(place, own, (len(edges), len(values)))
            areas.append(np.concatenate([_area(sums @ part, of_class @ part) for part in parts]))
        if not areas:
            return np.full(len(weights), np.nan)
        stacked = np.stack(areas)  # NaN where a class has no example in a sample
        return np.where(np.isnan(stacked), 0.0, stacked).sum(0) / (~np.isnan(stacked)).sum(0)


def _sums(to: np.ndarray, of: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """The matrix that adds row of[i] of what it is multiplied with to row to[i] of the product."""
    return sparse.csr_array((np.ones(len(to)), (to, of)), shape=shape)


def _area(sums: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """f64[r]: the area under the curve of one class. sums f64[2 k + 1, r]: the weights below the first of its k values,
    at it, between it and the second, and so on; positive f64[k, r]: the class's own at each.
    """
    up_to = np.cumsum(sums, 0)
    whole = positive.sum(0)
    pairs = np.einsum("kr,kr->r", positive, up_to[:-1:2] + up_to[1::2]) / 2
    return (pairs - whole**2 / 2) / (whole * (up_to[-1] - whole))


def score(labels: np.ndarray, probabilities: np.ndarray, given: Given = None) -> dict[str, float]:
    """The scores, see `Scores`, of all examples alike."""
    scores = Scores(labels, probabilities, given)
    return {name: float(value[0]) for name, value in scores.of(np.ones((1, len(labels)))).items()}


def intervals(
    labels: np.ndarray, probabilities: np.ndarray, samples: int = 1000, seed: int = 0, level: float = 0.95,
    given: Given = None,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """{name: (low, high)}: confidence intervals of the scores over test sets of this size, for this model.

    labels int[n], probabilities [n, classes]. Each interval holds the score itself. They say nothing of other seeds of
    training. Accuracy and top-5 accuracy have Wilson's interval, the calibration error has `calibration_interval`, and
    the others have the percentile bootstrap (Efron 1979) over `samples` of the examples. One example has no such
    sample. A score that is NaN has no interval, and AUC has none where it would take minutes.
    """
    scores = Scores(labels, probabilities, given)
    n, classes = probabilities.shape
    auc = samples * n * classes <= _MOST_AUC
    found = bootstrap(functools.partial(scores.of, auc=auc), n, samples, seed)
    out: dict[str, tuple[float, float]] = {}
    for name, (value,) in scores.of(np.ones((1, n)), auc).items():
        if np.isnan(value):
            continue
        if name in ("accuracy", "top5"):
            low, high = wilson_interval(round(value * n), n, level)
        elif name == "calibration_error":
            low, high = calibration_interval(scores, level)
        elif not found:
            continue
        else:  # in a sample without a class AUC may be NaN
            low, high = map(float, np.nanpercentile(found[name], [50 * (1 - level), 50 * (1 + level)]))
        out[name] = (float(min(low, value)), float(max(high, value)))
    return out


def bootstrap(
    of: Callable[[np.ndarray], Mapping[str, np.ndarray]], n: int, samples: int = 1000, seed: int = 0,
    at_once: int = _AT_ONCE,
) -> dict[str, np.ndarray]:  # fmt: skip
    """{name: f64[samples]}: the scores `of(weights f64[r, n])` of samples of n examples, drawn with replacement.

    {} of one example. At most `at_once` weights are held.
    """
    found: list[Mapping[str, np.ndarray]] = []
    generator = np.random.default_rng(seed)
    while n > 1 and samples > 0:
        some = min(samples, max(1, at_once // n))
        found.append(of(generator.multinomial(n, np.full(n, 1 / n), some).astype(np.float64)))
        samples -= some
    return {name: np.concatenate([one[name] for one in found]) for name in (found[0] if found else ())}


def with_bootstrap(
    of: Callable[[np.ndarray], Mapping[str, np.ndarray]], n: int, costs: int, level: float = 0.95
) -> dict[str, dict[str, float]]:
    """{score: {"value", and, where it is known, the ends "low" and "high" of its 95 % interval}}, by percentiles.

    `of` as for `bootstrap`; `exact_match` has Wilson's interval. `costs` is how many numbers a sample's scores look
    at: where that would take minutes there are no intervals.
    """
    found = bootstrap(of, n, at_once=_AT_ONCE // 8) if costs * 1000 <= _MOST_AUC else {}
    out = {}
    for name, values in of(np.ones((1, n))).items():
        value = float(values[0])
        out[name] = {"value": value}
        if np.isnan(value) or not found:
            continue
        if name == "exact_match":
            low, high = wilson_interval(round(value * n), n, level)
        else:
            low, high = map(float, np.nanpercentile(found[name], [50 * (1 - level), 50 * (1 + level)]))
        out[name] |= {"low": min(low, value), "high": max(high, value)}
    return out


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927), which has a width where all or none of n are successes."""
    z2 = float(special.ndtri((1 + level) / 2)) ** 2
    share, centre = successes / n, successes / n + z2 / (2 * n)
    half = (z2 * (share * (1 - share) / n + z2 / (4 * n * n))) ** 0.5
    return (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)


def calibration_interval(scores: Scores, level: float = 0.95) -> tuple[float, float]:
    """The confidence interval of the calibration error, by test inversion.

    On few examples the calibration error is biased upwards: it sums the absolute gaps of the bins, noise included. A
    bootstrap adds that noise a second time, so all of its percentiles may lie above the true error. This interval holds
    each true error, the observed gaps times a factor from 0 on, under which the observed error is not extreme once the
    bins have their normal noise. To estimate the variance of that noise, a bin's accuracy is shrunk towards its mean
    confidence by one example.
    """
    n, bins, confidence = len(scores.labels), scores.bins, scores.probabilities.max(1)
    right = (scores.ranks == 0).astype(np.float64)

    sums = functools.partial(np.bincount, bins, minlength=_BINS)  # over the examples of each bin
    count, gaps = sums(), sums(confidence - right) / n
    accuracy = (sums(right) + sums(confidence) / np.maximum(count, 1)) / (count + 1)
    squares = sums((confidence - accuracy[bins]) ** 2) + count * accuracy * (1 - accuracy)
    deviation = np.sqrt(np.maximum(squares / n - gaps**2, 0) / n)
    error = np.abs(gaps).sum()
    if not error:
        return 0.0, 0.0
    truths = np.linspace(0, error + 5 * np.sqrt((deviation**2).sum()), 61)
    noise = deviation * np.random.default_rng(0).normal(size=(1000, _BINS))
    below = [(np.abs(truth / error * np.abs(gaps) + noise).sum(1) < error).mean() for truth in truths]
    falling = np.minimum.accumulate(below)  # the greater the truth, the seldomer is less than `error` found
    low, high = np.interp([(1 + level) / 2, (1 - level) / 2], falling[::-1], truths[::-1])
    return float(low), min(1.0, float(high))


def with_intervals(labels: np.ndarray, probabilities: np.ndarray, given: Given = None) -> dict[str, dict[str, float]]:
    """{score: {"value", and, where it is known, the ends "low" and "high" of its 95 % interval}}."""
    ends = intervals(labels, probabilities, given=given)
    return {
        name: {"value": value} | (dict(zip(("low", "high"), ends[name], strict=True)) if name in ends else {})
        for name, value in score(labels, probabilities, given).items()
    }


class Reliability(NamedTuple):
    """Of each bin of confidence, [15]: how many examples are in it, and their means, which are NaN of an empty bin."""

    examples: np.ndarray  # int64
    confidence: np.ndarray  # f64: the mean probability of what is predicted
    accuracy: np.ndarray  # f64


def reliability(labels: np.ndarray, probabilities: np.ndarray, given: Given = None) -> Reliability:
    """The reliability diagram (DeGroot and Fienberg 1983, Guo et al. 2017), without rows that hold NaN.

    labels int[n], probabilities [n, classes]. The bins are those of the calibration error, see `Scores.of`.
    """
    whole = ~np.isnan(probabilities).any(1)
    given = given and (given[0][whole], given[1][whole])
    scores = Scores(labels[whole], probabilities[whole], given)
    count, confidence, right = (
        np.bincount(scores.bins, weights, _BINS)
        for weights in (None, scores.probabilities.max(1), (scores.ranks == 0).astype(float))
    )
    with np.errstate(invalid="ignore"):
        return Reliability(count, confidence / count, right / count)

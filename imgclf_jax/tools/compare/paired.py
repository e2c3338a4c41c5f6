"""Whether one model is better than another, from what both predict of the same examples."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import special

Method = Literal["mid-p", "exact", "chi-square"]


class Spread(NamedTuple):
    """Several values in short: how many, their mean, and their sample standard deviation, NaN of one value."""

    n: int
    mean: float
    std: float


def spread(parts: Sequence[Spread]) -> Spread:
    """The mean and the sample standard deviation of all values that the parts are of; NaN if a part's is not known.

    A single value x is the part `Spread(1, x, nan)`.
    """
    n = sum(part.n for part in parts)
    mean = sum(part.n * part.mean for part in parts) / n
    squares = sum(part.n * (part.mean - mean) ** 2 + (part.n - 1) * part.std**2 for part in parts if part.n > 1)
    squares += sum((part.mean - mean) ** 2 for part in parts if part.n == 1)
    return Spread(n, mean, float(np.sqrt(squares / (n - 1))) if n > 1 else float("nan"))


def mcnemar(first: int, second: int, method: Method = "mid-p") -> float:
    """The p-value that two models are right equally often (McNemar 1947, two-sided).

    `first` and `second` are how many examples only the first and only the second model has right. If both models are
    equally good, each of these is as likely to be of the one as of the other.

    - "exact": the binomial probability of what is as far from half or farther
    - "mid-p": what is just as far counts half (Fagerland, Lydersen and Laake 2013), which keeps the level nearly as
      strictly as the exact test and finds more
    - "chi-square": with continuity correction (Edwards 1948), for many such examples
    """
    n, least = first + second, min(first, second)
    if n == 0:
        return 1.0
    if method == "chi-square":
        return float(special.chdtrc(1, max(abs(first - second) - 1, 0) ** 2 / n))
    equal = float(np.exp(special.gammaln(n + 1) - special.gammaln(least + 1) - special.gammaln(n - least + 1)
                         - n * np.log(2)))  # fmt: skip
    if first == second:
        return 1.0 if method == "exact" else 1 - equal / 2
    exact = min(1.0, 2 * float(special.bdtr(least, n, 0.5)))
    return exact if method == "exact" else max(0.0, exact - equal)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, adjusted so that all may be held against one level (Holm 1979)."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


class Difference(NamedTuple):
    """A difference of accuracies, and the ends of its interval."""

    value: float
    low: float
    high: float


def difference(first: np.ndarray, second: np.ndarray, level: float = 0.95) -> Difference:
    """The mean accuracy of the first model's seeds less that of the second's, with an interval for other draws.

    first bool[s, n], second bool[t, n]: which of the same n examples each seed has right. The interval is for other
    examples and other seeds of training, those of each model by itself. Its variance has a part of each:

    - of a model's seeds, the variance between their accuracies divided by their number, as Welch (1947) has it. That
      variance also holds how far seeds differ since each is right on other examples, s or t times.
    - of the examples, the variance of their mean gain, divided by n, less what the first part holds of it (components
      of variance of a crossed design); 0 if that is below 0.

    With few seeds the first part is itself uncertain: the interval is Student's, with the degrees of freedom of
    Satterthwaite (1946), s - 1 and t - 1 for the seeds and n - 1 for the examples. So it is wide where two seeds alone
    say how much seeds differ. A model of one seed has no part of the first kind: its interval says nothing of other
    seeds. Of one example there is no interval, -1 to 1.
    """
    n = first.shape[1]
    value = float(first.mean() - second.mean())
    if n == 1:
        return Difference(value, -1.0, 1.0)
    parts, shared = [], 0.0
    for right in (first, second):
        if (seeds := len(right)) > 1:
            parts.append((float(right.mean(1).var(ddof=1)) / seeds, seeds - 1))
            shared += _noise(right) / seeds
    of_examples = float((first.mean(0) - second.mean(0)).var(ddof=1)) / n
    parts.append((max(0.0, of_examples - shared), n - 1))
    half = _half_width(parts, level)
    return Difference(value, max(-1.0, value - half), min(1.0, value + half))


def _half_width(parts: Sequence[tuple[float, int]], level: float) -> float:
    """Half of Student's interval, of independent variances with their degrees of freedom (Satterthwaite 1946)."""
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(variance**2 / own for variance, own in parts)
    return float(special.stdtrit(freedom, (1 + level) / 2)) * float(total**0.5)


def bootstrapped_difference(first: np.ndarray, second: np.ndarray, n: int, level: float = 0.95) -> Difference:
    """The mean score of the first model's seeds less that of the second's, with an interval for other draws.

    first f64[s, 1 + r], second f64[t, 1 + r]: a score of each seed on n examples, then on r samples of these, drawn
    with replacement, the same ones for all (the paired bootstrap; Efron 1979). For scores that are no means over
    examples. The interval is as that of `difference`; but the samples' variance, which stands in for the examples', is
    not reduced by what the seeds' variance holds of it, so that it is rather too wide. Without samples it has no ends.
    """
    value = float(first[:, 0].mean() - second[:, 0].mean())
    gains = first[:, 1:].mean(0) - second[:, 1:].mean(0)
    gains = gains[np.isfinite(gains)]
    if len(gains) < 2 or not np.isfinite(value):
        return Difference(value, -np.inf, np.inf)
    parts = [(float(one[:, 0].var(ddof=1)) / len(one), len(one) - 1) for one in (first, second) if len(one) > 1]
    half = _half_width([*parts, (float(gains.var(ddof=1)), n - 1)], level)
    return Difference(value, value - half, value + half)


def bootstrapped_p(first: np.ndarray, second: np.ndarray) -> float:
    """The p-value that two models have the same score, f64[1 + r] as for `bootstrapped_difference`, two-sided.

    Twice the share of samples in which the other model is better, or as good, counting the examples as one more.
    """
    gains = (first - second)[1:]
    gains = gains[np.isfinite(gains)]
    if not len(gains):
        return 1.0
    least = min(int((gains <= 0).sum()), int((gains >= 0).sum()))
    return min(1.0, 2 * (least + 1) / (len(gains) + 1))


def _noise(right: np.ndarray) -> float:
    """The variance of a seed's accuracy that is explained by the draw of examples on which seeds differ.

    right bool[s, n], s and n > 1: the mean square of what is left when seeds and examples are taken out, over n.
    """
    seeds, n = right.shape
    left = right - right.mean(0) - right.mean(1, keepdims=True) + right.mean()
    return float((left**2).sum()) / ((seeds - 1) * (n - 1)) / n

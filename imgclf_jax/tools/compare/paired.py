"""Paired tests and confidence intervals for the difference of two models on the same examples."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special


class Spread(NamedTuple):
    """The count, mean and sample standard deviation of several values; the latter is NaN for one value."""

    n: int
    mean: float
    std: float


def spread(parts: Sequence[Spread]) -> Spread:
    """Pools the mean and the sample standard deviation of all parts; NaN if a part's is unknown.

    A single value x is `Spread(1, x, nan)`.
    """
    n = sum(part.n for part in parts)
    mean = sum(part.n * part.mean for part in parts) / n
    squares = sum(part.n * (part.mean - mean) ** 2 + (part.n - 1) * part.std**2 for part in parts if part.n > 1)
    squares += sum((part.mean - mean) ** 2 for part in parts if part.n == 1)
    return Spread(n, mean, float(np.sqrt(squares / (n - 1))) if n > 1 else float("nan"))


def mcnemar(first: int, second: int) -> float:
    """Returns the two-sided mid-p-value of the hypothesis that two models are equally accurate (McNemar 1947).

    `first` and `second` count the discordant examples: those that only the first, or only the second, model predicts
    correctly. Under the hypothesis, a discordant example favors either model with probability 1/2. The p-value is the
    binomial probability of a split at least as uneven, with half the probability of the observed split (Fagerland,
    Lydersen and Laake 2013), which has more power than the exact test and nearly keeps the level.
    """
    n, least = first + second, min(first, second)
    if n == 0:
        return 1.0
    equal = float(np.exp(special.gammaln(n + 1) - special.gammaln(least + 1) - special.gammaln(n - least + 1)
                         - n * np.log(2)))  # fmt: skip
    return 1 - equal / 2 if first == second else 2 * float(special.bdtr(least, n, 0.5)) - equal


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts the p-values of a family of tests for multiple comparisons (Holm 1979)."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


class Difference(NamedTuple):
    """A difference of scores, with the ends of its confidence interval."""

    value: float
    low: float
    high: float


def difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Returns the difference of mean accuracies, first minus second, with a 95 % confidence interval.

    first bool[s, n], second bool[t, n]: which of the same n examples each seed predicts correctly. The interval covers
    other examples and, for each model separately, other training seeds. Its variance sums these components:

    - for each model, the variance of its seeds' accuracies divided by their number (Welch 1947). It includes the noise
      of seeds being correct on different examples.
    - for the examples, the variance of their mean gain divided by n, minus that noise, which the first component
      already counts (variance components of a crossed design); at least 0. If the seeds of both models happen to be
      equally accurate, the first component is 0 and nothing is subtracted.

    Because few seeds estimate the first component poorly, the interval is Student's with the degrees of freedom of
    Satterthwaite (1946), from s - 1, t - 1 and n - 1, so two seeds make it wide. A model with one seed has no first
    component: its interval does not cover other seeds. With one example it is (-1, 1). If all examples agree, as when
    both models are perfect, their variance is that of half an example more of each outcome (Agresti and Min 2005).
    """
    n = first.shape[1]
    value = float(first.mean() - second.mean())
    if n == 1:
        return Difference(value, -1.0, 1.0)
    variances, noise = [], 0.0
    for correct in (first, second):
        if (seeds := len(correct)) > 1:
            of_seeds = float(correct.sum(1).var(ddof=1)) / n**2  # exactly 0 if all are equal
            variances.append((of_seeds / seeds, seeds - 1))
            noise += _noise(correct) / seeds
    gains = first.mean(0) - second.mean(0)
    example_variance = float(gains.var(ddof=1)) / n
    if not example_variance:  # all examples agree; half an example more of each outcome (Agresti and Min 2005)
        example_variance = (abs(gains).sum() + 1 - gains.sum() ** 2 / (n + 2)) / (n + 2) ** 2
    counted = noise if any(variance for variance, _ in variances) else 0.0
    variances.append((max(0.0, example_variance - counted), n - 1))
    half = _half_width(variances)
    return Difference(value, max(-1.0, value - half), min(1.0, value + half))


def _half_width(variances: Sequence[tuple[float, int]]) -> float:
    """Returns half of Student's 95 % interval for independent (variance, degrees of freedom) (Satterthwaite 1946)."""
    total = sum(variance for variance, _ in variances)
    if total == 0:
        return 0.0
    df = total**2 / sum(variance**2 / own for variance, own in variances)
    return float(special.stdtrit(df, 0.975)) * float(total**0.5)


def bootstrap_difference(first: np.ndarray, second: np.ndarray, n: int) -> Difference:
    """Returns the difference of mean scores, first minus second, with a 95 % paired-bootstrap interval (Efron 1979).

    first f64[s, 1 + r], second f64[t, 1 + r]: each seed's score on n examples, then on r bootstrap samples of these,
    the same for all seeds. Serves scores that are not means over examples. The interval is that of `difference`, with
    the variance over samples as the examples' component. The seeds' noise is not subtracted from it, so the interval is
    somewhat too wide. Without samples, or with equal ones, it is infinite.
    """
    value = float(first[:, 0].mean() - second[:, 0].mean())
    gains = first[:, 1:].mean(0) - second[:, 1:].mean(0)
    gains = gains[np.isfinite(gains)]
    if len(gains) < 2 or not np.isfinite(value):
        return Difference(value, -np.inf, np.inf)
    variances = [(float(own[:, 0].var(ddof=1)) / len(own), len(own) - 1) for own in (first, second) if len(own) > 1]
    half = _half_width([*variances, (float(gains.var(ddof=1)), n - 1)])
    if not half:  # the same on all samples, which say nothing about other examples
        return Difference(value, -np.inf, np.inf)
    return Difference(value, value - half, value + half)


def bootstrap_p(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the two-sided bootstrap p-value of equal scores, given f64[1 + r] as in `bootstrap_difference`.

    It is twice the fraction of samples in which the other model is at least as good, with the examples themselves
    counted as one more sample.
    """
    gains = (first - second)[1:]
    gains = gains[np.isfinite(gains)]
    if not len(gains):
        return 1.0
    least = min(int((gains <= 0).sum()), int((gains >= 0).sum()))
    return min(1.0, 2 * (least + 1) / (len(gains) + 1))


def _noise(correct: np.ndarray) -> float:
    """Returns the interaction variance of seeds and examples, per accuracy: the residual mean square over n.

    correct bool[s, n], s and n > 1.
    """
    seeds, n = correct.shape
    residual = correct - correct.mean(0) - correct.mean(1, keepdims=True) + correct.mean()
    return float((residual**2).sum()) / ((seeds - 1) * (n - 1)) / n

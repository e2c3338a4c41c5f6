"""Paired tests and confidence intervals for the difference of two models on the same examples."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


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
    squares = sum(part.n * (part.mean - mean) ** 2 for part in parts)
    squares += sum((part.n - 1) * part.std**2 for part in parts if part.n > 1)
    return Spread(n, mean, float(np.sqrt(squares / (n - 1))) if n > 1 else float("nan"))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the two-sided mid-p-value of the hypothesis that two models are equally accurate (McNemar 1947).

    first, second bool[n]: which examples each predicts correctly. Of the examples that only one predicts correctly,
    each model has as many by the hypothesis. The p-value is that of the exact binomial test, less half the probability
    of a split as uneven as the observed one (Fagerland, Lydersen and Laake 2013), which has more power than the exact
    test and nearly keeps the level.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if not (n := only_first + only_second):
        return 1.0
    observed = float(stats.binom.pmf(only_first, n, 0.5)) * (1 if only_first == only_second else 2)
    return float(stats.binomtest(only_first, n).pvalue) - observed / 2


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
            between = float(correct.sum(1).var(ddof=1)) / n**2  # exactly 0 if all are equal
            variances.append((between / seeds, seeds - 1))
            noise += _noise(correct) / seeds
    gains = first.mean(0) - second.mean(0)
    of_examples = float(gains.var(ddof=1)) / n
    if not of_examples:  # all examples agree; half an example more of each outcome (Agresti and Min 2005)
        of_examples = (abs(gains).sum() + 1 - gains.sum() ** 2 / (n + 2)) / (n + 2) ** 2
    counted = noise if any(variance for variance, _ in variances) else 0.0
    variances.append((max(0.0, of_examples - counted), n - 1))
    total = sum(variance for variance, _ in variances)
    df = total**2 / sum(variance**2 / own for variance, own in variances)  # Satterthwaite 1946
    half = float(stats.t.ppf(0.975, df) * total**0.5)
    return Difference(value, max(-1.0, value - half), min(1.0, value + half))


def _noise(correct: np.ndarray) -> float:
    """Returns the interaction variance of seeds and examples, per accuracy: the residual mean square over n.

    correct bool[s, n], s and n > 1.
    """
    seeds, n = correct.shape
    residual = correct - correct.mean(0) - correct.mean(1, keepdims=True) + correct.mean()
    return float((residual**2).sum()) / ((seeds - 1) * (n - 1)) / n

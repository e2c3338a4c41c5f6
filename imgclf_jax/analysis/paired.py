"""Whether one model is better than another, from what both predict of the same examples."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import special

_AT_ONCE = 1 << 22  # counts of drawn examples that are held at once

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


def difference(
    first: np.ndarray, second: np.ndarray, samples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Difference:
    """The mean accuracy of the first model's seeds less that of the second's, with an interval by the bootstrap.

    first bool[s, n], second bool[t, n]: which of the same n examples each seed has right. Examples are drawn with
    replacement, the same for both models. Seeds are drawn too, for each model by itself. Seeds differ by chance on so
    many examples as well, which the draw of examples holds already: so their deviations are first reduced to what is
    beyond (components of variance of a crossed design), and widened by sqrt(s / (s - 1)), since the mean of few seeds
    hides a part of them. A model of one seed has no such part: its interval says nothing of other seeds.
    """
    generator = np.random.default_rng(seed)
    n, split = first.shape[1], len(first)
    # Examples on which all seeds behave alike are drawn together, which changes no probability.
    kinds, counts = np.unique(np.concatenate([first, second]), axis=1, return_counts=True)
    gain = kinds[:split].mean(0) - kinds[split:].mean(0)  # [kinds]
    parts = [min(_AT_ONCE // len(gain) + 1, samples - first) for first in range(0, samples, _AT_ONCE // len(gain) + 1)]
    drawn = np.concatenate([generator.multinomial(n, counts / n, some) @ gain / n for some in parts])  # [samples]
    drawn += _seed_part(first, samples, generator) - _seed_part(second, samples, generator)
    low, high = np.percentile(drawn, [50 * (1 - level), 50 * (1 + level)])
    return Difference(float(first.mean() - second.mean()), float(low), float(high))


def _seed_part(right: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """f64[samples]: how far the mean accuracy of drawn seeds lies from that of all, without the examples' chance."""
    seeds = len(right)
    if seeds == 1:
        return np.zeros(samples)
    deviations = right.mean(1) - right.mean()
    own = seed_share(right) * seeds / (seeds - 1)
    drawn = generator.multinomial(seeds, np.full(seeds, 1 / seeds), samples) @ deviations / seeds
    return np.sqrt(own) * drawn


def seed_share(right: np.ndarray) -> float:
    """Which share of the variance between the seeds' accuracies is not explained by the draw of examples, 0 to 1.

    right bool[s, n], s > 1. The mean squares of a crossed design without repetitions: of the seeds, and of what is left
    when seeds and examples are taken out.
    """
    seeds, n = right.shape
    between = right.mean(1).var(ddof=1)
    if between == 0:
        return 0.0
    left = right - right.mean(0) - right.mean(1, keepdims=True) + right.mean()
    noise = (left**2).sum() / ((seeds - 1) * max(n - 1, 1)) / n
    return float(max(0.0, 1 - noise / between))

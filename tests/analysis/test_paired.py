"""Paired tests against the binomial sum, explicit loops and simulations."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from imgclf_jax.analysis import paired
from imgclf_jax.analysis.paired import Spread


def by_sum(first, second, mid):
    """From the definition: the probability of outcomes farther from half than this one, and of those as far."""
    n = first + second
    far = abs(2 * first - n)
    chance = [math.comb(n, k) / 2**n for k in range(n + 1)]
    beyond = sum(p for k, p in enumerate(chance) if abs(2 * k - n) > far)
    same = sum(p for k, p in enumerate(chance) if abs(2 * k - n) == far)
    return beyond + (same / 2 if mid else same)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (3, 3), (5, 12), (12, 5), (0, 40), (301, 250), (7, 8)])
def test_mcnemar_is_the_binomial_sum(first, second):
    assert paired.mcnemar(first, second, "exact") == pytest.approx(by_sum(first, second, mid=False), rel=1e-10)
    assert paired.mcnemar(first, second) == pytest.approx(by_sum(first, second, mid=True), rel=1e-10)
    assert paired.mcnemar(first, second, "exact") == pytest.approx(stats.binomtest(first, first + second).pvalue)


def test_mcnemar_by_chi_square():
    """McNemar's example of Edwards: (|b - c| - 1)² / (b + c); near the exact test for many examples."""
    assert paired.mcnemar(40, 20, "chi-square") == pytest.approx(stats.chi2.sf(19**2 / 60, 1), rel=1e-12)
    assert paired.mcnemar(4, 4, "chi-square") == 1.0
    assert paired.mcnemar(5200, 5000, "chi-square") == pytest.approx(paired.mcnemar(5200, 5000, "exact"), rel=1e-3)


def test_mcnemar_without_a_difference():
    assert [paired.mcnemar(0, 0, method) for method in ("mid-p", "exact", "chi-square")] == [1.0, 1.0, 1.0]


def test_the_mid_p_test_keeps_its_level():
    """Of 30 examples that fall to either side by chance, p is at most 0.05 in about 5 % of all cases, and not above."""
    p = np.array([paired.mcnemar(k, 30 - k) for k in range(31)])
    chance = stats.binom.pmf(np.arange(31), 30, 0.5)
    assert 0.02 < chance[p <= 0.05].sum() <= 0.051


def test_holm():
    """By hand: the smallest times 4, the next times 3, …, and none below the one before."""
    assert paired.holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
    assert paired.holm([]) == []


def test_spread_of_parts_is_that_of_all_values():
    values = [[0.9], [0.8, 0.85, 0.95], [0.7, 0.9]]
    parts = [Spread(len(v), statistics.mean(v), statistics.stdev(v) if len(v) > 1 else math.nan) for v in values]
    flat = [x for v in values for x in v]
    assert paired.spread(parts) == pytest.approx((6, statistics.mean(flat), statistics.stdev(flat)))
    alone = paired.spread(parts[:1])
    assert alone[:2] == (1, 0.9)
    assert math.isnan(alone.std)


def share_by_loop(right):
    """The share of the seeds' variance that the examples do not explain, number by number."""
    s, n = right.shape
    accuracies = [float(row.mean()) for row in right]
    total = 0.0
    for row, own in zip(right, accuracies, strict=True):
        for i in range(n):
            total += (row[i] - own - right[:, i].mean() + right.mean()) ** 2
    return max(0.0, 1 - total / (s - 1) / (n - 1) / n / statistics.variance(accuracies))


def looped(first, second, samples, seed):
    """The same bootstrap, example by example and seed by seed."""
    rng = np.random.default_rng(seed)
    n, found = first.shape[1], []
    models = []
    for right, sign in ((first, 1), (second, -1)):
        if len(right) > 1:
            factor = math.sqrt(share_by_loop(right) * len(right) / (len(right) - 1))
            models.append((sign * factor, [float(row.mean()) for row in right]))
    for _ in range(samples):
        here = rng.integers(n, size=n)
        gain = first[:, here].mean() - second[:, here].mean()
        for factor, accuracies in models:
            drawn = [accuracies[k] for k in rng.integers(len(accuracies), size=len(accuracies))]
            gain += factor * (sum(drawn) - sum(accuracies)) / len(accuracies)
        found.append(gain)
    return np.percentile(found, [2.5, 97.5])


@pytest.mark.parametrize("seeds", [(1, 1), (3, 4), (1, 5)])
def test_the_bootstrap_is_that_of_a_loop(seeds):
    rng = np.random.default_rng(1)
    skill = [rng.uniform(0.6, 0.95, size=(s, 1)) for s in seeds]
    first, second = (rng.random((s, 40)) < of for s, of in zip(seeds, skill, strict=True))
    value, low, high = paired.difference(first, second, samples=20_000)
    assert value == pytest.approx(first.mean() - second.mean())
    expected = looped(first, second, 1500, 2)
    assert (low, high) == pytest.approx(expected, abs=0.12 * (high - low))  # two samples of percentiles


def test_of_one_seed_the_deviation_is_the_known_one():
    """Of paired proportions: sqrt(b + c - (b - c)² / n) / n."""
    first, second = np.ones((1, 1000), bool), np.ones((1, 1000), bool)
    first[0, :30], second[0, 20:100] = False, False
    b, c = 70, 20
    deviation = math.sqrt(b + c - (b - c) ** 2 / 1000) / 1000
    value, low, high = paired.difference(first, second)
    assert value == pytest.approx(0.05)
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.04)
    assert paired.difference(first, second) == (value, low, high)


def coverage(seeds, between, examples, times):
    """How often the interval holds the difference over all examples and all seeds there could be, here zero.

    Examples are of different difficulty. `between` is the deviation of the seeds' luck, in logits.
    """
    rng, covered = np.random.default_rng(0), 0
    for _ in range(times):
        difficulty = rng.normal(2, 1.5, size=examples)
        luck = rng.normal(0, between, size=(2 * seeds, 1))
        right = rng.random((2 * seeds, examples)) < 1 / (1 + np.exp(-(difficulty + luck)))
        _, low, high = paired.difference(right[:seeds], right[seeds:], samples=200, seed=int(rng.integers(2**32)))
        covered += low <= 0 <= high
    return covered / times


@pytest.mark.parametrize(("between", "low", "high"), [(0.0, 0.9, 0.985), (0.6, 0.86, 0.97)])
def test_the_interval_covers_the_difference(between, low, high):
    assert low < coverage(5, between, 150, 200) < high


# What docs/commands/compare.md has a table of.
COVERED = {(1, 0.0): 0.9375, (1, 0.3): 0.545, (2, 0.0): 0.9725, (2, 0.3): 0.8425, (3, 0.0): 0.945,
           (3, 0.3): 0.8775, (5, 0.0): 0.96, (5, 0.3): 0.91, (10, 0.0): 0.9475, (10, 0.3): 0.9425}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "between"), COVERED)
def test_what_the_page_says_of_coverage(seeds, between):
    assert coverage(seeds, between, 500, 400) == pytest.approx(COVERED[seeds, between], abs=0.01)


def test_the_share_of_the_seeds():
    """Without luck of a seed it is about 0; where each seed has skills of its own it is near 1."""
    rng = np.random.default_rng(3)
    same = np.mean([paired.seed_share(rng.random((8, 500)) < 0.8) for _ in range(50)])
    skilled = paired.seed_share(rng.random((8, 5000)) < rng.uniform(0.5, 0.9, size=(8, 1)))
    assert same < 0.3
    assert skilled > 0.97
    assert paired.seed_share(np.ones((3, 10), bool)) == 0.0

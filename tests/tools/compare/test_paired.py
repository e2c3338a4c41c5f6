"""Paired tests against the binomial sum, SciPy and simulations."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from imgclf_jax.tools.compare import paired
from imgclf_jax.tools.compare.paired import Spread


def by_sum(first, second):
    """By the definition: the probability of outcomes further from half than this one, plus half of those as far."""
    n = first + second
    far = abs(2 * first - n)
    chance = [math.comb(n, k) / 2**n for k in range(n + 1)]
    beyond = sum(p for k, p in enumerate(chance) if abs(2 * k - n) > far)
    same = sum(p for k, p in enumerate(chance) if abs(2 * k - n) == far)
    return beyond + same / 2


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (3, 3), (5, 12), (12, 5), (0, 40), (301, 250), (7, 8)])
def test_mcnemar_is_the_binomial_sum(first, second):
    right = np.repeat([[True, False], [False, True], [True, True], [False, False]], [first, second, 5, 3], 0)
    assert paired.mcnemar(*right.T) == pytest.approx(by_sum(first, second), rel=1e-10)


def test_holm():
    """By hand: the smallest times 4, the next times 3, …, and none below the one before."""
    assert paired.holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
    assert paired.mcnemar(np.ones(3, bool), np.ones(3, bool)) == 1.0  # without a difference


def test_spread_of_parts_is_that_of_all_values():
    values = [[0.9], [0.8, 0.85, 0.95], [0.7, 0.9]]
    parts = [Spread(len(v), statistics.mean(v), statistics.stdev(v) if len(v) > 1 else math.nan) for v in values]
    flat = [x for v in values for x in v]
    assert paired.spread(parts) == pytest.approx((6, statistics.mean(flat), statistics.stdev(flat)))
    alone = paired.spread(parts[:1])
    assert alone[:2] == (1, 0.9)
    assert math.isnan(alone.std)


def test_intervals_are_those_of_scipy():
    """Of single runs the paired t-test's; of seeds whose luck explains all, Welch's on their accuracies."""
    rng = np.random.default_rng(0)
    a, b = rng.random((5, 300)) < 0.9, rng.random((4, 300)) < 0.8
    welch = stats.ttest_ind(a.mean(1), b.mean(1), equal_var=False).confidence_interval()
    assert paired.difference(a, b)[1:] == pytest.approx(tuple(welch), rel=1e-9)
    t = stats.ttest_rel(a[0].astype(float), b[0].astype(float)).confidence_interval()
    assert paired.difference(a[:1], b[:1])[1:] == pytest.approx(tuple(t), rel=1e-9)


def coverage(seeds, between, examples, times):
    """How often the interval holds the difference over all examples and all seeds there could be, here zero.

    Examples are of different difficulty. Each model has this many `seeds`, whose luck has the standard deviation
    `between`, in logits.
    """
    rng, covered = np.random.default_rng(0), 0
    for _ in range(times):
        difficulty, luck = rng.normal(2, 1.5, size=examples), rng.normal(0, between, (2 * seeds, 1))
        right = rng.random((2 * seeds, examples)) < 1 / (1 + np.exp(-(difficulty + luck)))
        _, low, high = paired.difference(right[:seeds], right[seeds:])
        covered += low <= 0 <= high
    return covered / times


# The table of docs/commands/compare.md; the tests of every day draw fewer examples, as precisely as 0.027.
COVERED = {(1, 0.0): 0.9535, (1, 0.3): 0.564, (1, 1.0): 0.213, (2, 0.0): 0.965, (2, 0.3): 0.9705, (2, 1.0): 0.969,
           (3, 0.0): 0.962, (3, 0.3): 0.9625, (3, 1.0): 0.971, (5, 0.0): 0.9605, (5, 0.3): 0.9655, (5, 1.0): 0.968,
           (10, 0.0): 0.957, (10, 0.3): 0.958, (10, 1.0): 0.964}  # fmt: skip


@pytest.mark.parametrize(("seeds", "between"), [(2, 0.0), (2, 0.6), (5, 0.0), (5, 0.6)])
def test_the_interval_covers_the_difference(seeds, between):
    assert coverage(seeds, between, 150, 600) == pytest.approx(0.95, abs=0.027)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "between"), COVERED)
def test_what_the_page_says_of_coverage(seeds, between):
    assert coverage(seeds, between, 500, 2000) == pytest.approx(COVERED[seeds, between], abs=0.0011)


def test_models_that_agree_on_all_examples_may_differ_on_others():
    """Both are perfect on 24 examples: the difference is 0, and its interval has a width (Agresti and Min 2005)."""
    right = np.ones((1, 24), bool)
    assert paired.difference(right[:, :1], ~right[:, :1]) == (1, -1, 1)  # one example says nothing
    found = paired.difference(right, right)
    assert found.value == 0
    assert -found.low == found.high == pytest.approx(stats.t.ppf(0.975, 23) / 26)
    assert paired.difference(right, ~right).low == pytest.approx(0.862, abs=0.01)

"""Confidence intervals of scores, over test sets of the same size: Wilson's, and the percentile bootstrap."""

from collections.abc import Callable, Mapping

import numpy as np

from imgclf_jax.core.text import decimals, interval

type Compute = Callable[[np.ndarray], Mapping[str, np.ndarray]]  # example weights f64[r, n] → {score: f64[r]}

_PROPORTIONS = ("accuracy", "top5", "exact_match")  # of examples, so their intervals are Wilson's
_BIASED = ("calibration_error",)  # resampling adds to its bias, so all percentiles may exceed the true error
_SAMPLES = 1000
_MAX_WEIGHTS = 1 << 22  # bootstrap weights in memory at a time
_MAX_COST = 2_000_000_000  # numbers that a bootstrap may read, about ten seconds


def with_intervals(compute: Compute, n: int, outputs: int, first: int = 0) -> dict[str, dict[str, float]]:
    """Returns {score: {"value", "low", "high"}} with the ends of its 95 % confidence interval, if known.

    `compute` is that of predictions for n examples, with `outputs` probabilities each. The intervals contain the score,
    and do not cover the variation over training seeds. Fractions of examples have the score interval of Wilson (1927),
    the others that of the percentile bootstrap (Efron 1979). The calibration error has none, nor have a NaN, a perfect
    score that is the same on all resamples, and scores whose bootstrap would take minutes. The `first` examples, if
    given, are of another set than the others, and both are resampled separately.
    """
    from scipy import stats

    resampled = bootstrap(compute, n, first=first) if n * outputs * _SAMPLES <= _MAX_COST else {}
    out = {}
    for name, (value,) in compute(np.ones((1, n))).items():
        out[name] = {"value": float(value)}
        if np.isnan(value):
            continue
        low = high = value
        if name in _PROPORTIONS:
            low, high = stats.binomtest(round(value * n), n).proportion_ci(method="wilson")
        elif name in resampled and name not in _BIASED:
            low, high = np.nanpercentile(resampled[name], [2.5, 97.5])  # AUC of a one-class sample is NaN
        if low < high:
            out[name] |= {"low": float(min(low, value)), "high": float(max(high, value))}
    return out


def table(scores: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """The columns and the rows of what `with_intervals` returns."""
    rows = [[name, decimals(score["value"]), interval(score["low"], score["high"]) if "low" in score else ""]
            for name, score in scores.items()]  # fmt: skip
    return ["score", "value", "95 % interval"], rows


def bootstrap(
    compute: Compute, n: int, samples: int = _SAMPLES, seed: int = 0, first: int = 0
) -> dict[str, np.ndarray]:
    """Returns {score: f64[samples]}: the scores of resamples of n examples with replacement; {} for one example."""
    if n < 2:
        return {}
    generator = np.random.default_rng(seed)
    sizes = np.diff([*range(0, samples, max(1, _MAX_WEIGHTS // n)), samples])
    parts = [part for part in (first, n - first) if part]
    chunks = [compute(np.hstack([generator.multinomial(m, np.full(m, 1 / m), size) for m in parts]).astype(np.float64))
              for size in sizes]  # fmt: skip
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}

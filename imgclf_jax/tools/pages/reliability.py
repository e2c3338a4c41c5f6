"""A reliability diagram as inline SVG: accuracy by confidence, and the number of examples in each bin."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from imgclf_jax.scores.classification import BINS, confidence_bins
from imgclf_jax.tools.pages.charts import grid_line, label, svg, y_label

_WIDTH, _LEFT, _RIGHT, _TOP = 420, 54, 12, 8
_UPPER, _GAP, _LOWER, _BOTTOM = 220, 26, 60, 40


class Reliability(NamedTuple):
    """The examples in each bin of confidence, and their means, NaN for an empty bin."""

    examples: np.ndarray  # i64[bins]
    confidence: np.ndarray  # f64[bins]: the mean probability of the predicted class
    accuracy: np.ndarray  # f64[bins]


def bin_by_confidence(confidence: np.ndarray, correct: np.ndarray) -> Reliability:
    """The reliability diagram of predictions (DeGroot and Fienberg 1983, Guo et al. 2017), without those that are NaN.

    confidence f64[n], correct bool[n]. The bins are those of the calibration error.
    """
    known = ~np.isnan(confidence)
    bins = confidence_bins(confidence[known])
    count, *sums = (np.bincount(bins, weights, BINS) for weights in (None, confidence[known], correct[known]))
    with np.errstate(invalid="ignore"):
        return Reliability(count, *(total / count for total in sums))


def diagram(title: str, examples: Sequence[int], confidence: Sequence[float], accuracy: Sequence[float]) -> str:
    """Draws an `svg` element; each sequence has a value for each bin, and bins have equal width in [0, 1].

    A bar is a bin's accuracy, a dot its mean confidence and accuracy. Below are the example counts of the bins.
    """
    bins, base = len(examples), _TOP + _UPPER
    foot, most = base + _GAP + _LOWER, max(*examples, 1)
    across = (_WIDTH - _LEFT - _RIGHT) / bins

    def x(value: float) -> float:
        return _LEFT + value * across * bins

    description = ("Each bar is the accuracy of the examples in its bin of confidence; the dashed line is the "
                   "diagonal. A table below has the values.")  # fmt: skip
    parts = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(grid_line(_LEFT, _WIDTH - _RIGHT, base - value * _UPPER, f"{value:g}"))
        parts.append(label(x(value), foot + 17, f"{value:g}"))
    for i, (count, mean, own) in enumerate(zip(examples, confidence, accuracy, strict=True)):
        if not count:
            continue
        left, width = x(i / bins) + 1, across - 2
        parts.append(_bar("c0", left, width, base, own * _UPPER, f"accuracy {own:.3f} of {count} examples"))
        parts.append(_bar("c8", left, width, foot, count / most * _LOWER, f"{count} examples"))
        parts.append(label(left + width / 2, foot - count / most * _LOWER - 4, short(count), style="small"))
        parts.append(f'<circle class="dot c1" cx="{x(mean):.1f}" cy="{base - own * _UPPER:.1f}" r="3.5"/>')
    parts.append(f'<path class="ideal" d="M{x(0):.1f} {base}L{x(1):.1f} {_TOP}"/>')
    parts += [f'<path class="axis" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>' for y in (base, foot)]
    parts.append(label((_LEFT + _WIDTH - _RIGHT) / 2, foot + _BOTTOM - 6, "confidence"))
    parts += [y_label(base - _UPPER / 2, "accuracy"), y_label(foot - _LOWER / 2, "examples")]
    return svg(_WIDTH, foot + _BOTTOM, title, description, parts)


def _bar(color: str, x: float, width: float, base: float, height: float, title: str) -> str:
    return (f'<rect class="dot {color}" x="{x:.1f}" y="{base - height:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'opacity=".55"><title>{title}</title></rect>')  # fmt: skip


def short(count: int) -> str:
    """Formats a count with few digits: 999, 1.2k, 45k, 1.2M."""
    if count < 1000:
        return str(count)
    power = min(int(math.log10(count) // 3), 3)
    value = count / 1000**power
    return f"{value:.1f}{'kMG'[power - 1]}" if value < 9.95 else f"{value:.0f}{'kMG'[power - 1]}"

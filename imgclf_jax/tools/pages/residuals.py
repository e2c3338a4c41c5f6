"""The errors of a regression as inline SVG: residuals by the true value, and how often each size of error occurs."""

from collections.abc import Sequence
from html import escape

import numpy as np

from imgclf_jax.tools.pages.charts import Axis, ticks

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 260, 60, 12, 10, 40
_POINTS = 2000  # at most
_BINS = 20


def plot(title: str, truth: np.ndarray, errors: np.ndarray) -> str:
    """An `svg` of the errors f64[n] by the true values f64[n], a dot an example; finite ones, at most 2,000."""
    known = np.flatnonzero(np.isfinite(truth) & np.isfinite(errors))
    if not known.size:
        return ""
    some = known[np.linspace(0, len(known) - 1, min(len(known), _POINTS)).astype(int)]
    x, y = _over(truth[some], _LEFT, _WIDTH - _RIGHT), _over([*errors[some], 0.0], _HEIGHT - _BOTTOM, _TOP)
    dots = [f'<circle class="dot c0" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5" opacity=".5"/>'
            for a, b in zip(truth[some], errors[some], strict=True)]  # fmt: skip
    zero = f'<path class="ideal" d="M{_LEFT} {y(0.0):.1f}H{_WIDTH - _RIGHT}"/>'
    return _svg(title, "Each dot is an example; on the dashed line the prediction is right.",
                [*_grid(x, y), *dots, zero], "true value", "predicted less true")  # fmt: skip


def histogram(title: str, errors: np.ndarray) -> str:
    """An `svg` of how many of the errors f64[n] lie in each of 20 bins of equal width; finite ones."""
    known = errors[np.isfinite(errors)]
    if not known.size:
        return ""
    counts, edges = np.histogram(known, _BINS)
    x, y = _over(edges, _LEFT, _WIDTH - _RIGHT), _over([0.0, counts.max()], _HEIGHT - _BOTTOM, _TOP)
    bars = [
        f'<rect class="dot c0" x="{x(a) + 1:.1f}" y="{y(n):.1f}" width="{max(1.0, x(b) - x(a) - 2):.1f}" '
        f'height="{y(0.0) - y(n):.1f}" opacity=".55"><title>{n} from {a:.4g} to {b:.4g}</title></rect>'
        for n, a, b in zip(counts.tolist(), edges, edges[1:], strict=False)
        if n
    ]
    return _svg(title, "Each bar is the number of examples whose error lies in its bin.", [*_grid(x, y), *bars],
                "predicted less true", "examples")  # fmt: skip


def _over(values: Sequence[float] | np.ndarray, first: float, last: float) -> Axis:
    """A linear axis over all of some values."""
    low, high = float(np.min(values)), float(np.max(values))
    margin = 0.5 if low == high else 0.0
    return Axis(low - margin, high + margin, first, last)


def _grid(x: Axis, y: Axis) -> list[str]:
    parts = []
    for value in ticks(y.low, y.high):
        parts += [f'<path class="grid" d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}"/>',
                  f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>']  # fmt: skip
    parts += [f'<text x="{x(value):.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{value:g}</text>'
              for value in ticks(x.low, x.high)]  # fmt: skip
    return parts


def _svg(title: str, said: str, parts: Sequence[str], below: str, beside: str) -> str:
    name, middle = escape(title), (_TOP + _HEIGHT - _BOTTOM) / 2
    axes = (
        f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(below)}</text>'
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(beside)}</text>'
    )
    return (f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}. {said}"><title>{name}</title>'
            f"{''.join(parts)}{axes}</svg>")  # fmt: skip

"""The errors of a regression as inline SVG: residuals by true value, and their histogram."""

from collections.abc import Sequence

import numpy as np

from imgclf_jax.tools.pages.charts import Axis, grid_line, label, svg, tick_labels, ticks, y_label

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 260, 60, 12, 10, 40
_POINTS = 2000  # at most
_BINS = 20


def plot(title: str, truth: np.ndarray, errors: np.ndarray) -> str:
    """Plots errors f64[n] against true values f64[n]: a dot per example, at most 2,000, without nonfinite ones."""
    finite = np.flatnonzero(np.isfinite(truth) & np.isfinite(errors))
    if not finite.size:
        return ""
    shown = finite[np.linspace(0, len(finite) - 1, min(len(finite), _POINTS)).astype(int)]
    x, y = _axis(truth[shown], _LEFT, _WIDTH - _RIGHT), _axis([*errors[shown], 0.0], _HEIGHT - _BOTTOM, _TOP)
    dots = [f'<circle class="dot c0" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5" opacity=".5"/>'
            for a, b in zip(truth[shown], errors[shown], strict=True)]  # fmt: skip
    zero = f'<path class="ideal" d="M{_LEFT} {y(0.0):.1f}H{_WIDTH - _RIGHT}"/>'
    return _in_axes(title, "Each dot is an example; on the dashed line the error is 0.",
                    [*_grid(x, y), *dots, zero], "true value", "predicted minus true")  # fmt: skip


def histogram(title: str, errors: np.ndarray) -> str:
    """Plots a histogram of the finite errors f64[n], with 20 bins of equal width."""
    finite = errors[np.isfinite(errors)]
    if not finite.size:
        return ""
    counts, edges = np.histogram(finite, _BINS)
    x, y = _axis(edges, _LEFT, _WIDTH - _RIGHT), _axis([0.0, counts.max()], _HEIGHT - _BOTTOM, _TOP)
    bars = [
        f'<rect class="dot c0" x="{x(a) + 1:.1f}" y="{y(n):.1f}" width="{max(1.0, x(b) - x(a) - 2):.1f}" '
        f'height="{y(0.0) - y(n):.1f}" opacity=".55"><title>{n} from {a:.4g} to {b:.4g}</title></rect>'
        for n, a, b in zip(counts.tolist(), edges, edges[1:], strict=False)
        if n
    ]
    return _in_axes(title, "Each bar is the number of examples with an error in its bin.", [*_grid(x, y), *bars],
                    "predicted minus true", "examples")  # fmt: skip


def _axis(values: Sequence[float] | np.ndarray, first: float, last: float) -> Axis:
    """Returns a linear axis that covers the values."""
    low, high = float(np.min(values)), float(np.max(values))
    margin = 0.5 if low == high else 0.0
    return Axis(low - margin, high + margin, first, last)


def _grid(x: Axis, y: Axis) -> list[str]:
    across, up = ticks(x.low, x.high), ticks(y.low, y.high)
    lines = [grid_line(_LEFT, _WIDTH - _RIGHT, y(value), text) for value, text in zip(up, tick_labels(up), strict=True)]
    numbers = zip(across, tick_labels(across), strict=True)
    return lines + [label(x(value), _HEIGHT - _BOTTOM + 17, text) for value, text in numbers]


def _in_axes(title: str, description: str, parts: Sequence[str], x_name: str, y_name: str) -> str:
    axes = [
        f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>',
        label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_name),
        y_label((_TOP + _HEIGHT - _BOTTOM) / 2, y_name),
    ]
    return svg(_WIDTH, _HEIGHT, title, description, [*parts, *axes])

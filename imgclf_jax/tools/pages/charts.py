"""Line charts as inline SVG, for pages without network access or scripts."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

COLORS = 10  # CSS classes c0 to c9 in the page's style sheet
_POINTS = 300  # most points in a line
_HOVERED = 100  # most points of a line that show their values

_WIDTH, _HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 16, 40
_ROUNDING = 1e-5  # values with a smaller relative difference make a level line, so that tick labels differ
_LOG_FROM = 20  # the ratio of the largest to the smallest value from which the axis is logarithmic


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart: its name, the index of its color below COLORS, and its points in order of x."""

    name: str
    color: int
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()  # (x, low, high), drawn behind it
    dashed: bool = False


type Axis = Callable[[float], float]  # from a value to its coordinate


def axis(low: float, high: float, first: float, last: float, log: bool = False) -> Axis:
    """An axis, linear or logarithmic, from `low` at the coordinate `first` to `high` at `last`; it clips values."""
    scale: Axis = math.log10 if log else float
    return lambda value: float(np.interp(scale(max(low, value)), [scale(low), scale(high)], [first, last]))


def thinned[T](items: Sequence[T], most: int = _POINTS) -> list[T]:
    """Selects at most `most` items at even distances, from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def ticks(low: float, high: float) -> list[float]:
    """Returns about five round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns 1, 2 and 5 times powers of ten from `low` to `high`, or only the powers if these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    return [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]


def chart(title: str, x_name: str, lines: Sequence[Line], description: str = "", linear: bool = False) -> str:
    """Draws a chart as an `svg` element, or returns "" without a finite value.

    Nonfinite values are gaps, and lines without points are left out.

    The `description` is where each line ends, unless another is given. Unless it is to be `linear`, the y axis is
    logarithmic if all values are positive and the largest is far above the smallest; the ends of a line do not
    stretch such an axis, as where a learning rate ends at 0. Values that differ only by float32 rounding make a
    level line, on an axis from 0. Points show their values while the mouse is over them.
    """
    lines = [line for line in lines if line.points]
    if not (ends := _range(lines, linear)):
        return ""
    low, high, log = ends
    steps = [x for line in lines for x, _ in line.points]
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    start, end = min(0.0, *steps), max(steps)
    across, up = axis(start, end, _LEFT, right), axis(low, high, bottom, _TOP, log)
    parts = []
    for y in log_ticks(low, high) if log else ticks(low, high):
        parts.append(f'<path class="grid" d="M{_LEFT} {up(y):.1f}H{right}"/>')
        parts.append(_label(_LEFT - 6, up(y) + 4, f"{y:.7g}", "end"))
    parts += [_label(across(x), bottom + 17, _short(x)) for x in ticks(start, end)]
    parts.append(_label((_LEFT + right) / 2, _HEIGHT - 6, x_name))
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    if log:
        parts.append(_label(right, _TOP - 4, "logarithmic", "end"))
    for line in lines:
        parts += _line(line, across, up, x_name)
    title = escape(title)
    said = escape(description or "; ".join(f"{line.name} ends at {line.points[-1][1]:.4g}" for line in lines))
    return (f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}. {said}">'
            f"<title>{title}</title><desc>{said}</desc>{''.join(parts)}</svg>")  # fmt: skip


def _label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _range(lines: Sequence[Line], linear: bool) -> tuple[float, float, bool] | None:
    """(lowest, highest, logarithmic) of the y axis; None without a finite value."""

    def values(part: slice) -> list[float]:
        points = [point for line in lines for point in (*line.points[part], *line.band[part])]
        return [y for _, *ys in points for y in ys if math.isfinite(y)]

    if not (every := values(slice(None))):
        return None
    low, high = min(every), max(every)
    floor = min(values(slice(1, -1)), default=low)
    if floor > 0 and high / floor >= _LOG_FROM and low < floor / 10 and not linear:
        low = floor
    if low > 0 and high / low >= _LOG_FROM and not linear:
        return low, high, True
    if high - low > _ROUNDING * max(abs(low), abs(high)):
        margin = (high - low) * 0.04
        return low - margin, high + margin, False
    return min(0.0, 1.25 * low), max(0.0, 1.25 * high) or float(not low), False


def _line(line: Line, across: Axis, up: Axis, x_name: str) -> list[str]:
    color, out = f"c{line.color}", []
    if band := [(across(x), up(low), up(high)) for x, low, high in line.band if math.isfinite(low + high)]:
        edge = [f"{x:.1f} {high:.1f}" for x, _, high in band] + [f"{x:.1f} {low:.1f}" for x, low, _ in reversed(band)]
        out.append(f'<path class="band {color}" d="M{"L".join(edge)}Z"/>')
    shape, pen = "", "M"
    for x, y in line.points:
        shape, pen = (f"{shape}{pen}{across(x):.1f} {up(y):.1f}", "L") if math.isfinite(y) else (shape, "M")
    dashes = " dashed" if line.dashed else ""
    out.append(f'<path class="line {color}{dashes}" d="{shape}"><title>{escape(line.name)}</title></path>')
    finite = [(x, y) for x, y in line.points if math.isfinite(y)]
    if len(finite) == 1:
        out.append(f'<circle class="dot {color}" cx="{across(finite[0][0]):.1f}" cy="{up(finite[0][1]):.1f}" r="3"/>')
    for x, y in thinned(finite, _HOVERED):  # invisible points with their values as titles
        title = escape(f"{line.name}, {x_name} {x:g}: {y:.5g}")
        out.append(f'<circle class="point {color}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="5"><title>{title}</title>'
                   "</circle>")  # fmt: skip
    return out


def _short(x: float) -> str:
    """Formats 20000 as 20k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(x) >= 10 * size or (abs(x) >= size and x % size == 0):
            return f"{x / size:g}{letter}"
    return f"{x:g}"

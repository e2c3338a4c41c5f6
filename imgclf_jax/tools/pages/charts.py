"""Line charts as inline SVG, for pages without network access or scripts."""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

COLORS = 10  # CSS classes c0 to c9 in the page's style sheet
_POINTS = 300  # most points in a line

_WIDTH, _HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 16, 40
_SECOND = 15  # the height of a second row of numbers below the x axis
_HOVERED = 100  # most points of a line that show their values
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


@dataclasses.dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis, which maps a value to a coordinate."""

    low: float
    high: float
    first: float  # the coordinate of `low`
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        a, b, v = (math.log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.first + (self.last - self.first) * (v - a) / ((b - a) or 1.0)

    def clipped(self, value: float) -> float:
        """The coordinate of a value, or of the nearest one on the axis."""
        return self(min(max(value, self.low), self.high))


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


def tick_labels(values: Sequence[float]) -> list[str]:
    """Formats numbers with six digits, or as many as make them differ."""
    shown = ([f"{value:.{digits}g}" for value in values] for digits in range(6, 17))
    return next((labels for labels in shown if len(set(labels)) == len(labels)), [f"{value:g}" for value in values])


def log_ticks(low: float, high: float) -> list[float]:
    """Returns 1, 2 and 5 times powers of ten from `low` to `high`, or only the powers if these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    return [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A second unit of the x axis, such as epochs: a value of x is `per` times as many of the first."""

    name: str
    per: float


def chart(
    title: str, x_name: str, lines: Sequence[Line], second: Unit | None = None, description: str = ""
) -> str:  # fmt: skip
    """Draws a chart as an `svg` element, or returns "" without a finite value. Nonfinite values are gaps.

    The `description` is where each line ends, unless another is given.

    The y axis is logarithmic if all values are positive and the largest is far above the smallest. The ends of a line
    do not stretch such an axis, as where a learning rate ends at 0. Values that differ only by float32 rounding make a
    level line, on an axis from 0. Points show their values while the mouse is over them.
    """
    ends = _range(lines)
    if not ends:
        return ""
    low, high, log = ends
    steps = [x for line in lines for x, _ in line.points]
    right = _WIDTH - _RIGHT
    across = Axis(min(0.0, *steps), max(steps), _LEFT, right)
    bottom = _HEIGHT - _BOTTOM
    up = Axis(low, high, bottom, _TOP, log)
    marks = log_ticks(low, high) if log else ticks(low, high)
    parts = [grid_line(_LEFT, right, up(y), text) for y, text in zip(marks, tick_labels(marks), strict=True)]
    parts += [label(across(x), bottom + 17, _short(x)) for x in ticks(across.low, across.high)]
    if second:
        marks = ticks(across.low / second.per, across.high / second.per)
        parts += [label(across(x * second.per), bottom + 17 + _SECOND, _short(x)) for x in marks]
        parts += [label(_LEFT - 12, bottom + 17 + row * _SECOND, name, "end")
                  for row, name in enumerate((x_name, second.name))]  # fmt: skip
    else:
        parts.append(label((_LEFT + right) / 2, _HEIGHT - 6, x_name))
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    if log:
        parts.append(label(right, _TOP - 4, "logarithmic", "end"))
    for line in lines:
        parts += _line(line, across, up)
        parts += _hovered(line, across, up, x_name, second)
    description = description or "; ".join(f"{line.name} ends at {line.points[-1][1]:.4g}" for line in lines)
    return svg(_WIDTH, _HEIGHT, title, description, parts)


def svg(width: int, height: int, title: str, description: str, parts: Sequence[str]) -> str:
    """Returns an `svg` element with `parts`; its title and its description are also what a screen reader says."""
    title, description = escape(title), escape(description)
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}. {description}">'
            f"<title>{title}</title><desc>{description}</desc>{''.join(parts)}</svg>")  # fmt: skip


def grid_line(left: float, right: float, y: float, text: str) -> str:
    """Returns a horizontal line, labeled at its left end."""
    return f'<path class="grid" d="M{left} {y:.1f}H{right}"/>' + label(left - 6, y + 4, text, "end")


def label(x: float, y: float, text: str, anchor: str = "middle", style: str = "") -> str:
    """Returns text at a point, the `anchor` of the text; `style` is a class of the page's style sheet."""
    style = f' class="{style}"' if style else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def y_label(y: float, text: str) -> str:
    """Returns text along the left edge, rotated, with its middle at `y`."""
    return f'<text transform="translate(14 {y:.1f}) rotate(-90)" text-anchor="middle">{escape(text)}</text>'


def _range(lines: Sequence[Line]) -> tuple[float, float, bool] | None:
    """(lowest, highest, logarithmic) of the y axis; None without a finite value."""
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    values += [y for line in lines for _, *ends in line.band for y in ends if math.isfinite(y)]
    if not values:
        return None
    low, high = min(values), max(values)
    inner = [y for line in lines for _, y in line.points[1:-1] if math.isfinite(y)]
    inner += [y for line in lines for _, *ends in line.band[1:-1] for y in ends if math.isfinite(y)]
    floor = min(inner, default=low)
    if floor > 0 and high / floor >= _LOG_FROM and low < floor / 10:
        low = floor
    if low > 0 and high / low >= _LOG_FROM:
        return low, high, True
    magnitude = max(abs(low), abs(high))
    if high - low > _ROUNDING * magnitude:
        margin = (high - low) * 0.04
        return low - margin, high + margin, False
    return min(0.0, 1.25 * low), max(0.0, 1.25 * high) or float(not low), False


def _line(line: Line, across: Axis, up: Axis) -> list[str]:
    color, out = f"c{line.color}", []
    band = [
        (across(x), up.clipped(low), up.clipped(high))
        for x, low, high in line.band
        if math.isfinite(low) and math.isfinite(high)
    ]
    if band:
        edge = [f"{x:.1f} {high:.1f}" for x, _, high in band] + [f"{x:.1f} {low:.1f}" for x, low, _ in reversed(band)]
        out.append(f'<path class="band {color}" d="M{"L".join(edge)}Z"/>')
    shape, pen = "", "M"
    for x, y in line.points:
        if math.isfinite(y):
            shape, pen = f"{shape}{pen}{across(x):.1f} {up.clipped(y):.1f}", "L"
        else:
            pen = "M"
    dashes = " dashed" if line.dashed else ""
    out.append(f'<path class="line {color}{dashes}" d="{shape}"><title>{escape(line.name)}</title></path>')
    if len(line.points) == 1:
        x, y = line.points[0]
        out.append(f'<circle class="dot {color}" cx="{across(x):.1f}" cy="{up.clipped(y):.1f}" r="3"/>')
    return out


def _hovered(line: Line, across: Axis, up: Axis, x_name: str, second: Unit | None) -> list[str]:
    """Invisible points with their values as titles; for a long line some of them, the last included."""
    out = []
    for x, y in thinned([(x, y) for x, y in line.points if math.isfinite(y)], _HOVERED):
        also = f", {second.name} {x / second.per:.4g}" if second else ""
        title = escape(f"{line.name}, {x_name} {x:g}{also}: {y:.5g}")
        out.append(f'<circle class="point c{line.color}" cx="{across(x):.1f}" cy="{up.clipped(y):.1f}" r="5">'
                   f"<title>{title}</title></circle>")  # fmt: skip
    return out


def _short(x: float) -> str:
    """Formats 20000 as 20k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(x) >= 10 * size or (abs(x) >= size and x % size == 0):
            return f"{x / size:g}{letter}"
    return f"{x:g}"

"""Heatmap figures, drawn with Pillow: the image, the heatmap over it, a color scale and a title."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from imgclf_jax.tools.pages.pictures import fitting, to_rgb

# Equidistant colors of viridis (van der Walt and Smith 2015), whose lightness rises monotonically: the order survives
# color blindness and grayscale print. Others are interpolated.
COLORS = np.array([
    (68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139), (51, 99, 141), (44, 114, 142),
    (38, 130, 142), (33, 145, 140), (31, 160, 136), (40, 174, 128), (63, 188, 115), (94, 201, 98), (132, 212, 75),
    (173, 220, 48), (216, 226, 25), (253, 231, 37),
], np.float64)  # fmt: skip

_SIDE = 256  # smallest shorter side of an image in the figure
_MARGIN, _BAR, _TEXT = 12, 16, 15
_REGIONS = (
    ("upper left", "top", "upper right"),
    ("left side", "middle", "right side"),
    ("lower left", "bottom", "lower right"),
)
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)


def colormap(values: np.ndarray) -> np.ndarray:
    """Maps values in [0, 1] to colors uint8[…, 3], with clipping."""
    positions = np.linspace(0, 1, len(COLORS))
    return np.stack([np.rint(np.interp(values, positions, channel)) for channel in COLORS.T], -1).astype(np.uint8)


def scale(values: np.ndarray, signed: bool) -> np.ndarray:
    """Scales a map to [0, 1]: the minimum (or, if `signed`, everything below 0) becomes 0, the maximum 1.

    Returns zeros if no value exceeds the lower end.
    """
    low = 0.0 if signed else float(values.min())
    high = float(values.max())
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Overlays a heatmap [h', w'] in [0, 1], enlarged bilinearly, on uint8[h, w, 1 to 4] in gray: uint8[h, w, 3]."""
    gray = np.asarray(Image.fromarray(to_rgb(image)).convert("L"), np.float64)[..., None]
    large = Image.fromarray(heat.astype(np.float32)).resize(image.shape[1::-1], Image.Resampling.BILINEAR)
    return np.rint(0.45 * gray + 0.55 * colormap(np.asarray(large))).astype(np.uint8)


def peak(values: np.ndarray, signed: bool) -> str:
    """Describes the position of the maximum by thirds, such as "the upper left"; "" if nothing stands out.

    Several maxima are averaged.
    """
    if not scale(values, signed).any():
        return ""
    center = (np.argwhere(values == values.max()).mean(0) + 0.5) / values.shape
    row, column = (min(int(3 * position), 2) for position in center)
    return f"the {_REGIONS[row][column]}"


def draw(image: np.ndarray, values: np.ndarray, signed: bool, title: Sequence[str]) -> Image.Image:
    """Draws an image uint8[h, w, 1, 3 or 4] next to its heatmap [h', w'], below the lines of the title.

    Small images are enlarged by an integer factor. See `scale` for `signed`.
    """
    rgb = to_rgb(image)
    factor = -(-_SIDE // min(rgb.shape[:2]))
    large = rgb.repeat(factor, 0).repeat(factor, 1)
    h, w = large.shape[:2]
    font = ImageFont.load_default(_TEXT)
    marks = [f"{values.max():.3g}", f"{0.0 if signed else values.min():.3g}"]
    right = max(int(font.getlength(mark)) for mark in marks) + 2 * _MARGIN + _BAR
    width = 2 * w + 2 * _MARGIN + _MARGIN + right
    lines = [part for line in title for part in textwrap.wrap(line, max(1, int(width / (0.55 * _TEXT))))]
    top = _MARGIN + (len(lines) * 4 * _TEXT) // 3 + _MARGIN // 2
    picture = Image.new("RGB", (width, top + h + _MARGIN), _WHITE)
    pen = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        own, line = fitting(line, _TEXT)
        pen.text((_MARGIN, _MARGIN + i * 4 * _TEXT // 3), line, _BLACK, own)
    picture.paste(Image.fromarray(large), (_MARGIN, top))
    picture.paste(Image.fromarray(overlay(large, scale(values, signed))), (2 * _MARGIN + w, top))
    bar = np.broadcast_to(colormap(np.linspace(1, 0, h))[:, None], (h, _BAR, 3))
    left = 3 * _MARGIN + 2 * w
    picture.paste(Image.fromarray(np.ascontiguousarray(bar)), (left, top))
    pen.text((left + _BAR + 4, top), marks[0], _BLACK, font)
    pen.text((left + _BAR + 4, top + h), marks[1], _BLACK, font, anchor="ls")
    return picture

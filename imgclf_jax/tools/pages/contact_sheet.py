"""A contact sheet: many images in rows with captions, drawn with Pillow."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from imgclf_jax.tools.pages.pictures import Font, fitting, to_rgb

_SIDES = (84, 224)  # pixels: smaller images are enlarged to the first, larger ones shrunk to the second
_FONT, _LINE, _GAP = 12, 15, 6  # pixels
_WIDTH = 1400  # of the sheet, about
_BACKGROUND, _INK, _GREY = (255, 255, 255), (20, 20, 20), (120, 120, 120)


def draw(images: np.ndarray, captions: Sequence[Sequence[str]]) -> Image.Image:
    """Draws images uint8[n, h, w, c], n at least 1, in order, with the lines of a caption under each.

    The first line is gray; text wider than its image is truncated. See `to_rgb` for the colors.
    """
    n, h, w, _ = images.shape
    side = max(h, w)  # an enlarged image has square pixels
    factor = min(1.0, _SIDES[1] / side) if side >= _SIDES[0] else math.ceil(_SIDES[0] / side)
    width, height = max(1, round(w * factor)), max(1, round(h * factor))
    cell, lines = max(width, _SIDES[0]), max(map(len, captions))
    step_x, step_y = cell + _GAP, height + lines * _LINE + _GAP
    columns = max(1, min(n, (_WIDTH - _GAP) // step_x))
    size = (columns * step_x + _GAP, -(-n // columns) * step_y + _GAP)
    sheet = Image.new("RGB", size, _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = _GAP + i % columns * step_x, _GAP + i // columns * step_y
        sheet.paste(Image.fromarray(to_rgb(image)).resize((width, height), method), (x + (cell - width) // 2, y))
        for line, text in enumerate(caption):
            font, text = fitting(text, _FONT)
            shown = _truncate(text, font, cell)
            left = x + (cell - font.getlength(shown)) / 2
            pen.text((left, y + height + line * _LINE), shown, fill=_INK if line else _GREY, font=font)
    return sheet


def _truncate(text: str, font: Font, width: int) -> str:
    """Truncates text to at most `width` pixels."""
    shown = text
    while text and font.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text}…"
    return shown

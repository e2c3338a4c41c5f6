"""A picture of many images in rows, with lines of text under each, drawn by Pillow."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SIDES = (84, 224)  # pixels: smaller images are enlarged to the first, larger ones reduced to the second
_FONT, _LINE, _GAP = 12, 15, 6  # pixels
_WIDTH = 1400  # of the picture, about
_BACKGROUND, _INK, _GREY = (255, 255, 255), (20, 20, 20), (120, 120, 120)


def scale(width: int) -> float:
    """By what images of this width are enlarged: a whole number, so that a pixel stays a square; below 1, reduced."""
    return min(1.0, _SIDES[1] / width) if width >= _SIDES[0] else float(math.ceil(_SIDES[0] / width))


def draw(images: np.ndarray, captions: Sequence[Sequence[str]]) -> Image.Image:
    """The picture of images uint8[n, h, w, c], n at least 1, in their order, and the lines of text under each.

    The first line is grey. One channel is shown in grey, two in red and green, and of more than three the first three.
    Text that is wider than its image is cut.
    """
    n, h, w, _ = images.shape
    by = scale(max(h, w))
    width, height = max(1, round(w * by)), max(1, round(h * by))
    cell, lines = max(width, _SIDES[0]), max(map(len, captions))
    step_x, step_y = cell + _GAP, height + lines * _LINE + _GAP
    columns = max(1, min(n, (_WIDTH - _GAP) // step_x))
    size = (columns * step_x + _GAP, -(-n // columns) * step_y + _GAP)
    sheet = Image.new("RGB", size, _BACKGROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    method = Image.Resampling.NEAREST if by >= 1 else Image.Resampling.BOX
    for place, (image, texts) in enumerate(zip(images, captions, strict=True)):
        x, y = _GAP + place % columns * step_x, _GAP + place // columns * step_y
        sheet.paste(Image.fromarray(_colours(image)).resize((width, height), method), (x + (cell - width) // 2, y))
        for line, text in enumerate(texts):
            shown = _cut(text, font, cell)
            left = x + (cell - font.getlength(shown)) / 2
            pen.text((left, y + height + line * _LINE), shown, fill=_INK if line else _GREY, font=font)
    return sheet


def _colours(image: np.ndarray) -> np.ndarray:
    """uint8[h, w, c] to uint8[h, w, 3]."""
    h, w, c = image.shape
    if c == 1:
        return np.repeat(image, 3, 2)
    return image[..., :3] if c >= 3 else np.concatenate([image, np.zeros((h, w, 1), np.uint8)], 2)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of the text as is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"

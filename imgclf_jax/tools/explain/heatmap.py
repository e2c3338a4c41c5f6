"""A picture of a heat map: the image, the map over it, and the scale of its colours, with a title. Pillow draws."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Colours of rising lightness, at equal distances, between which others are interpolated: they keep their order for
# everybody, and in print without colours. They are those of viridis (van der Walt and Smith 2015).
COLOURS = np.array([
    (68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139), (51, 99, 141), (44, 114, 142),
    (38, 130, 142), (33, 145, 140), (31, 160, 136), (40, 174, 128), (63, 188, 115), (94, 201, 98), (132, 212, 75),
    (173, 220, 48), (216, 226, 25), (253, 231, 37),
], np.float64)  # fmt: skip

_SIDE = 256  # an image's shorter side in the picture, at least
_MARGIN, _BAR, _TEXT = 12, 16, 15
_PLACES = (
    ("upper left", "top", "upper right"),
    ("left side", "middle", "right side"),
    ("lower left", "bottom", "lower right"),
)
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)


def colours(values: np.ndarray) -> np.ndarray:
    """uint8[…, 3] for values in [0, 1]; what is outside takes the nearest end."""
    places = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.rint(np.interp(values, places, one)) for one in COLOURS.T], -1).astype(np.uint8)


def scaled(values: np.ndarray, signed: bool) -> np.ndarray:
    """The map in [0, 1]: its least value becomes 0 and its greatest 1, or, of a `signed` map, all below 0 become 0.

    All zeros if no value is greater than that.
    """
    low = 0.0 if signed else float(values.min())
    high = float(values.max())
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)


def over(image: np.ndarray, heat: np.ndarray, share: float = 0.55) -> np.ndarray:
    """The colours of a heat map [h', w'] in [0, 1], laid over uint8[h, w, 1 to 4] in grey: uint8[h, w, 3].

    The map is enlarged bilinearly; it has `share` of each pixel.
    """
    h, w = image.shape[:2]
    large = Image.fromarray(heat.astype(np.float32)).resize((w, h), Image.Resampling.BILINEAR)
    grey = np.asarray(Image.fromarray(_rgb(image)).convert("L"), np.float64)[..., None]
    return np.rint((1 - share) * grey + share * colours(np.asarray(large))).astype(np.uint8)


def place(values: np.ndarray, signed: bool) -> str:
    """Where the map is greatest, in words such as "the upper left": which third of its height and of its width.

    Empty if nothing stands out: see `scaled`. Of several equal places it is their mean.
    """
    if not scaled(values, signed).any():
        return ""
    middle = (np.argwhere(values == values.max()).mean(0) + 0.5) / values.shape
    row, column = (min(int(3 * at), 2) for at in middle)
    return f"the {_PLACES[row][column]}"


def draw(image: np.ndarray, values: np.ndarray, signed: bool, title: Sequence[str]) -> Image.Image:
    """The image uint8[h, w, 1, 3 or 4] beside the map [h', w'] over it, below the lines of the title.

    A small image is enlarged by a whole number, so that its pixels can be seen. See `scaled` for `signed`.
    """
    rgb = _rgb(image)
    times = -(-_SIDE // min(rgb.shape[:2]))
    large = rgb.repeat(times, 0).repeat(times, 1)
    h, w = large.shape[:2]
    font = ImageFont.load_default(_TEXT)
    ends = [f"{end:.3g}" for end in (max(0.0, values.max()) if signed else values.max(), 0 if signed else values.min())]
    right = max(int(font.getlength(end)) for end in ends) + 2 * _MARGIN + _BAR
    width = 2 * w + 2 * _MARGIN + _MARGIN + right
    lines = [part for line in title for part in textwrap.wrap(line, max(1, int(width / (0.55 * _TEXT))))]
    top = _MARGIN + (len(lines) * 4 * _TEXT) // 3 + _MARGIN // 2
    picture = Image.new("RGB", (width, top + h + _MARGIN), _WHITE)
    pen = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + i * 4 * _TEXT // 3), line, _BLACK, font)
    picture.paste(Image.fromarray(large), (_MARGIN, top))
    picture.paste(Image.fromarray(over(large, scaled(values, signed))), (2 * _MARGIN + w, top))
    bar = np.broadcast_to(colours(np.linspace(1, 0, h))[:, None], (h, _BAR, 3))
    left = 3 * _MARGIN + 2 * w
    picture.paste(Image.fromarray(np.ascontiguousarray(bar)), (left, top))
    pen.text((left + _BAR + 4, top), ends[0], _BLACK, font)
    pen.text((left + _BAR + 4, top + h), ends[1], _BLACK, font, anchor="ls")
    return picture


def _rgb(image: np.ndarray) -> np.ndarray:
    """uint8[h, w, 3] of uint8[h, w, c]: grey (and alpha, for two channels), colours, or colours and alpha."""
    if image.shape[-1] in (1, 2):
        return image[..., :1].repeat(3, -1)
    return image[..., :3]

"""Images between host ops: uint8[h, w, c], or a Pillow image of 8 bits per channel.

The ops of this package pass on the Pillow image that `decode` opens, because converting it to an array and back takes
half as long as decoding. Other ops get arrays.
"""

import math

import numpy as np
from PIL import Image

from imgclf_jax.core.errors import UserError

type Picture = np.ndarray | Image.Image

MAX_PIXELS = 2**26  # 8192 by 8192; Pillow itself warns from 89 million and refuses from twice that
MAX_SIDE = 2**20  # 16 times that of JPEG; Pillow holds a pointer per row
_STRIP = 2**20  # pixels that are copied from Pillow at once


def check_pixels(what: str, height: int, width: int) -> None:
    """Raises UserError if an image, or one between the passes of an op, would take too much memory."""
    if height * width > MAX_PIXELS:
        raise UserError(f"{what} has more than {MAX_PIXELS:,} pixels; make it smaller")
    if max(height, width) > MAX_SIDE:
        raise UserError(f"{what} has {height:,} by {width:,} pixels, but a side may have {MAX_SIDE:,}; crop it")


def check_size(op: str, **sides: int) -> None:
    """Raises UserError naming `op` unless each side of its output has pixels."""
    for name, side in sides.items():
        if side < 1:
            raise UserError(f"{op}({name}={side}): must be 1 or more")


def check_range(op: str, argument: str, value: tuple[float, float], most: float = math.inf) -> None:
    """Raises UserError naming `op` unless a range from which it draws is a pair of ascending numbers above 0."""
    if not (isinstance(value, tuple | list) and len(value) == 2 and 0 < value[0] <= value[1] <= most):
        limit = "" if most == math.inf else f" <= {most}"
        raise UserError(f"{op}({argument}={value}): must be a pair (low, high) with 0 < low <= high{limit}")


def size_of(image: Picture) -> tuple[int, int]:
    """The height and width."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[0], image.shape[1]


def crop(image: Picture, top: int, left: int, height: int, width: int) -> Picture:
    """Crops (height, width) pixels from (top, left) on."""
    if isinstance(image, Image.Image):
        return image.crop((left, top, left + width, top + height))
    return image[top : top + height, left : left + width]


def to_pillow(image: Picture) -> Image.Image:
    """Converts uint8[h, w, c] to a Pillow image of 1, 3 or 4 channels."""
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def to_array(image: Picture) -> np.ndarray:
    """Converts a Pillow image to [h, w, c], in strips of rows.

    Pillow holds the GIL while it copies an image's bytes, and no other thread would run until 200 MB are copied.
    """
    if not isinstance(image, Image.Image):
        return image
    rows = max(1, _STRIP // image.width)
    if image.height <= rows:
        out = np.asarray(image)
        return out[..., None] if out.ndim == 2 else out
    strips = (
        to_array(image.crop((0, top, image.width, min(top + rows, image.height))))
        for top in range(0, image.height, rows)
    )
    first = next(strips)
    out = np.empty((image.height, *first.shape[1:]), first.dtype)
    out[:rows] = first
    for i, strip in enumerate(strips, 1):
        out[i * rows : (i + 1) * rows] = strip
    return out

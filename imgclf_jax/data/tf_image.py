"""Crops and resizing with the semantics of `tf.image`, for the recipes of big_vision.

They return uint8, truncated instead of rounded, like a cast in TensorFlow.
"""

import math

import numpy as np
from PIL import Image

from imgclf_jax.core import kinds
from imgclf_jax.data import pictures
from imgclf_jax.data.pictures import Picture

_ATTEMPTS = 100
_BLOCK = 1 << 20  # float64 values that `area` averages at a time


@kinds.random
def inception_crop(
    rng: np.random.Generator, image: Picture, height: int, width: int = 0, area: tuple[float, float] = (0.05, 1.0),
    ratio: tuple[float, float] = (0.75, 1.33),
) -> Picture:  # fmt: skip
    """Crops a random height and aspect ratio and resizes it to (height, width), or (height, height), by `bilinear`.

    As in TensorFlow's `sample_distorted_bounding_box`, the ratio w / h is uniform in `ratio`, and the height uniform
    between those of the least and greatest `area` (a share of the image's), as far as it fits. Small crops are thus
    more frequent than with `random_resized_crop`, whose area is uniform. If 100 draws do not fit, it takes the whole
    image.
    """
    pictures.check_size("inception_crop", height=height, width=width or height)
    pictures.check_range("inception_crop", "area", area, 1)
    pictures.check_range("inception_crop", "ratio", ratio)
    h, w = pictures.size_of(image)
    for _ in range(_ATTEMPTS):
        if box := _crop(rng, h, w, area, rng.uniform(*ratio)):
            image = pictures.crop(image, *box)
            break
    return bilinear(image, height, width or height)


def _crop(
    rng: np.random.Generator, h: int, w: int, area: tuple[float, float], aspect: float
) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) of one attempt, or None if it has another area or does not fit."""
    least, most = (share * h * w for share in area)
    highest = min(round(math.sqrt(most / aspect)), math.floor((w + 0.5 - 1e-7) / aspect), h)
    lowest = min(round(math.sqrt(least / aspect)), highest)
    crop_h = lowest + int(rng.integers(highest - lowest + 1))
    # Rounding may put the area outside its bounds; one row more or less corrects that.
    if crop_h * round(crop_h * aspect) < least:
        crop_h += 1
    if crop_h * round(crop_h * aspect) > most:
        crop_h -= 1
    crop_w = round(crop_h * aspect)
    if not (least <= crop_h * crop_w <= most and 0 < crop_h <= h and 0 < crop_w <= w):
        return None
    # As in TensorFlow, the last offset is never drawn.
    top, left = (int(rng.integers(max(1, size - crop))) for size, crop in ((h, crop_h), (w, crop_w)))
    return top, left, crop_h, crop_w


def bilinear(image: Picture, height: int, width: int) -> Picture:
    """`tf.image.resize(method="bilinear", antialias=False)`: interpolates the four nearest pixels."""
    pictures.check_pixels(f"the image resized to {height:,} by {width:,}", height, width)
    picture = pictures.to_pillow(image)
    box = (0, 0, picture.width, picture.height)
    # Channel by channel, since Pillow weights colors by alpha.
    channels = map(picture.getchannel, range(4)) if picture.mode == "RGBA" else [picture]
    bands = [one.transform((width, height), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR) for one in channels]
    out = Image.merge("RGBA", bands) if len(bands) > 1 else bands[0]
    return out if isinstance(image, Image.Image) else pictures.to_array(out)


def area(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """`tf.image.resize(method="area")`: the mean over the area of each output pixel."""
    h, w, c = image.shape
    columns, rows = (max(1, _BLOCK // (max(side) * c)) for side in ((h, height), (w, width)))
    tall = np.empty((height, w, c))
    for left in range(0, w, columns):
        tall[:, left : left + columns] = _area(image[:, left : left + columns].astype(np.float64), height)
    out = np.empty((height, width, c), np.uint8)
    for top in range(0, height, rows):
        mean = _area(tall[top : top + rows].swapaxes(0, 1), width).swapaxes(0, 1)
        out[top : top + rows] = mean + 1e-6  # keeps an integer mean from truncating to the level below
    return out


def _area(x: np.ndarray, size: int) -> np.ndarray:
    """Averages [n, …] to [size, …], by differences of the integral over the first axis."""
    n = len(x)
    edges = np.arange(size + 1) * (n / size)
    below = np.minimum(edges.astype(int), n - 1)
    integral = np.concatenate([np.zeros_like(x[:1]), np.cumsum(x, 0)])
    at_edges = integral[below] + (edges - below).reshape(-1, *[1] * (x.ndim - 1)) * x[below]
    out: np.ndarray = np.diff(at_edges, axis=0) * (size / n)
    return out

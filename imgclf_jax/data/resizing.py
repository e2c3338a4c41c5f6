"""Host ops that crop and resize uint8[h, w, c] to uint8[h', w', c].

Pillow resizes, but for `inception_crop` and the method "area", which give the pixels of `tf.image` for the recipes of
big_vision: truncated to uint8 instead of rounded, like a cast in TensorFlow. All refuse to allocate too large an image.

The ops also take a Pillow image of `decode`, and may return one: to convert it takes half as long as decoding.
"""

import math

import numpy as np
from PIL import Image

from imgclf_jax.core import kinds
from imgclf_jax.core.errors import UserError, check_choice

type Picture = np.ndarray | Image.Image  # uint8[h, w, c], or 8 bits per channel

MAX_PIXELS = 2**26  # 8192 by 8192; Pillow itself warns from 89 million and refuses from twice that
MAX_SIDE = 2**20  # 16 times that of JPEG; Pillow holds a pointer per row
_BLOCK = 1 << 20  # float64 values that `area` averages at a time
_FILTERS = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")}
_LIKE = ("tensorflow", "torchvision")


def check_pixels(what: str, height: int, width: int) -> None:
    """Raises UserError if an image, or one between the passes of an op, has no pixels or takes too much memory."""
    if min(height, width) < 1:
        raise UserError(f"{what} has {height} by {width} pixels; make it larger")
    if height * width > MAX_PIXELS:
        raise UserError(f"{what} has more than {MAX_PIXELS:,} pixels; make it smaller")
    if max(height, width) > MAX_SIDE:
        raise UserError(f"{what} has {height:,} by {width:,} pixels, but a side may have {MAX_SIDE:,}; crop it")


def _check_ranges(share: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Raises UserError unless crops can be drawn with a share of the area and an aspect ratio in these ranges."""
    if not (0 < share[0] <= share[1] <= 1 and 0 < ratio[0] <= ratio[1]):
        raise UserError(f"no crop has an area in {share} and a ratio in {ratio}; write (low, high) with "
                        "0 < low <= high, and areas up to 1")  # fmt: skip


def to_array(image: Picture) -> np.ndarray:
    """Converts a Pillow image to [h, w, c]."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 and isinstance(image, Image.Image) else array


def to_pillow(image: Picture) -> Image.Image:
    """Converts uint8[h, w, c] to a Pillow image of 1 to 4 channels."""
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Converts f32 in [0, 1], with clipping, to uint8; returns uint8 unchanged."""
    if image.dtype == np.uint8:
        return image
    return np.round(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)


def size_of(image: Picture) -> tuple[int, int]:
    """The height and width."""
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[0], image.shape[1])


def crop(image: Picture, top: int, left: int, height: int, width: int) -> Picture:
    """Crops (height, width) pixels from (top, left) on."""
    if isinstance(image, Image.Image):
        return image.crop((left, top, left + width, top + height))
    return image[top : top + height, left : left + width]


def resize(image: Picture, height: int, width: int = 0, method: str = "bilinear") -> Picture:
    """Resizes to (height, width), or (height, height), with antialiasing.

    `method` is nearest, bilinear, bicubic or lanczos as in Pillow, which weights colors by alpha, or TensorFlow's area.
    """
    check_choice("method of resize", method, (*_FILTERS, "area"))
    width = width or height
    h, w = size_of(image)
    if (h, w) == (height, width):
        return image
    what = f"the image of {h:,} by {w:,} pixels, on its way to {height:,} by {width:,},"
    # `area` resizes the height first and Pillow the width, so a thin image may be larger in between.
    check_pixels(what, max(h, height), max(w, width) if method == "area" else width)
    if method == "area":
        return area(to_array(image), height, width)
    return to_array(to_pillow(image).resize((width, height), _FILTERS[method]))


def resize_small(image: Picture, size: int, method: str = "bilinear", like: str = "tensorflow") -> Picture:
    """Resizes the shorter side to `size`, keeping the aspect ratio.

    The longer side is rounded to the nearest pixel, as in TensorFlow recipes, or truncated with `like="torchvision"`.
    """
    h, w = size_of(image)
    if _as_torchvision(like):
        new = (size, size * w // h) if h <= w else (size * h // w, size)
    else:
        scale = size / min(h, w)
        new = max(size, round(h * scale)), max(size, round(w * scale))
    return resize(image, *new, method)


def central_crop(image: Picture, height: int, width: int = 0, like: str = "tensorflow") -> Picture:
    """Crops the central (height, width), or (height, height).

    An odd margin has its smaller half above and left. With `like="torchvision"`, half the margin is rounded to even.
    Raises UserError if the image is smaller.
    """
    width = width or height
    h, w = size_of(image)
    if height > h or width > w:
        raise UserError(f"central_crop({height}, {width}): the image has only {h} by {w} pixels; resize it first")
    top, left = (h - height) // 2, (w - width) // 2
    if _as_torchvision(like):
        top, left = round((h - height) / 2), round((w - width) / 2)
    return crop(image, top, left, height, width)


def _as_torchvision(like: str) -> bool:
    check_choice("value of like", like, _LIKE)
    return like == "torchvision"


@kinds.random
def random_resized_crop(
    rng: np.random.Generator, image: Picture, height: int, width: int = 0, scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3), method: str = "bilinear",
) -> Picture:  # fmt: skip
    """Crops a random area and aspect ratio and resizes it to (height, width) (Szegedy et al. 2014, arXiv:1409.4842).

    The share of the image's area is uniform in `scale`, the ratio w / h log-uniform in `ratio`. If ten draws do not
    fit, it takes the largest central crop within `ratio`.
    """
    _check_ranges(scale, ratio)
    h, w = size_of(image)
    for _ in range(10):
        area = h * w * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_h, crop_w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < crop_h <= h and 0 < crop_w <= w:
            top, left = int(rng.integers(0, h - crop_h + 1)), int(rng.integers(0, w - crop_w + 1))
            break
    else:
        crop_w = max(1, round(h * ratio[1])) if w / h > ratio[1] else w
        crop_h = max(1, round(w / ratio[0])) if w / h < ratio[0] else h
        top, left = (h - crop_h) // 2, (w - crop_w) // 2
    return resize(crop(image, top, left, crop_h, crop_w), height, width or height, method)


@kinds.random
def inception_crop(
    rng: np.random.Generator, image: Picture, height: int, width: int = 0, area: tuple[float, float] = (0.05, 1.0),
    ratio: tuple[float, float] = (0.75, 1.33),
) -> Picture:  # fmt: skip
    """Crops a random height and aspect ratio and resizes it to (height, width), or (height, height), by `bilinear`.

    As in TensorFlow's `sample_distorted_bounding_box`, the ratio w / h is uniform in `ratio`, and the height uniform
    between those of the least and greatest `area` (a share of the image's), as far as it fits. Small crops are thus
    more frequent than with `random_resized_crop`, whose area is uniform. If 100 draws do not fit, it crops nothing.
    """
    _check_ranges(area, ratio)
    h, w = size_of(image)
    for _ in range(100):
        if box := _crop(rng, h, w, area, rng.uniform(*ratio)):
            image = crop(image, *box)
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


def bilinear(image: Picture, height: int, width: int) -> np.ndarray:
    """`tf.image.resize(method="bilinear", antialias=False)`: interpolates the four nearest pixels."""
    check_pixels(f"the image resized to {height:,} by {width:,}", height, width)
    picture = to_pillow(image)
    box = (0, 0, picture.width, picture.height)
    # Channel by channel, since Pillow weights colors by alpha.
    channels = map(picture.getchannel, range(4)) if picture.mode == "RGBA" else [picture]
    bands = [one.transform((width, height), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR) for one in channels]
    return to_array(Image.merge("RGBA", bands) if len(bands) > 1 else bands[0])


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

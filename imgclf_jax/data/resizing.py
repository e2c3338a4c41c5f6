"""Host ops that crop and resize uint8[h, w, c] to uint8[h', w', c] by Pillow.

`pictures.check_pixels` refuses an image that would become too large before it is allocated.
"""

import math

import numpy as np
from PIL import Image

from imgclf_jax.core import kinds
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.data import pictures, tf_image
from imgclf_jax.data.pictures import Picture

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_LIKE = ("tensorflow", "torchvision")


def resize(image: Picture, height: int, width: int = 0, method: str = "bilinear") -> Picture:
    """Resizes to (height, width), or (height, height), with antialiasing.

    `method` is nearest, bilinear, bicubic or lanczos as in Pillow, or area as in TensorFlow. In RGBA, Pillow weights
    colors by alpha. Raises UserError if the image would become too large.
    """
    if method not in (*_FILTERS, "area"):
        raise UserError(f"resize(method={method!r}): allowed are {', '.join(_FILTERS)} and area")
    width = width or height
    pictures.check_size("resize", height=height, width=width)
    h, w = pictures.size_of(image)
    if (h, w) == (height, width):
        return image
    what = f"the image of {h:,} by {w:,} pixels, on its way to {height:,} by {width:,},"
    # `area` resizes the height first and Pillow the width, so a thin image may be larger in between.
    pictures.check_pixels(what, max(h, height), max(w, width) if method == "area" else width)
    if method == "area":
        return tf_image.area(pictures.to_array(image), height, width)
    out = pictures.to_pillow(image).resize((width, height), _FILTERS[method])
    return out if isinstance(image, Image.Image) else pictures.to_array(out)


def resize_small(image: Picture, size: int, method: str = "bilinear", like: str = "tensorflow") -> Picture:
    """Resizes the shorter side to `size`, keeping the aspect ratio.

    The longer side is rounded to the nearest pixel, as in TensorFlow recipes, or truncated with `like="torchvision"`.
    Raises UserError if the image would become too large.
    """
    pictures.check_size("resize_small", size=size)
    h, w = pictures.size_of(image)
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
    pictures.check_size("central_crop", height=height, width=width)
    h, w = pictures.size_of(image)
    if height > h or width > w:
        raise UserError(f"central_crop({height}, {width}): the image has only {h} by {w} pixels; resize it first")
    top, left = (h - height) // 2, (w - width) // 2
    if _as_torchvision(like):
        top, left = round((h - height) / 2), round((w - width) / 2)
    return pictures.crop(image, top, left, height, width)


def _as_torchvision(like: str) -> bool:
    if like not in _LIKE:
        raise UserError(unknown("value of like", like, _LIKE))
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
    pictures.check_size("random_resized_crop", height=height, width=width or height)
    pictures.check_range("random_resized_crop", "scale", scale, 1)
    pictures.check_range("random_resized_crop", "ratio", ratio)
    h, w = pictures.size_of(image)
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
    return resize(pictures.crop(image, top, left, crop_h, crop_w), height, width or height, method)

"""Host ops that crop and resize uint8[h, w, c] to uint8[h', w', c] by Pillow.

Each op computes its output size, and refuses an image that is too small for it, or a size that needs too much memory,
before allocating it: see `memory`. `SIZES` can thus tell from an image's header what the ops would refuse.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from imgclf_jax.core import kinds, memory
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.data import decode_cost, pictures, tf_image
from imgclf_jax.data.pictures import Picture

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_SUPPORT = 6  # the width of the widest filter, lanczos, in source pixels
_LIKE = ("tensorflow", "torchvision")

Size = tuple[int, int]  # height, width


def resize(image: Picture, height: int, width: int = 0, method: str = "bilinear") -> Picture:
    """Resizes to (height, width), or (height, height), with antialiasing.

    `method` is nearest, bilinear, bicubic or lanczos as in Pillow, or area as in TensorFlow. In RGBA, Pillow weights
    colors by alpha. Raises UserError if it needs more memory than an op may take.
    """
    if method not in (*_FILTERS, "area"):
        raise UserError(f"resize(method={method!r}): allowed are {', '.join(_FILTERS)} and area")
    pictures.check_size("resize", height=height, width=width or height)
    size = resized(pictures.size_of(image), height, width, method)
    if pictures.size_of(image) == size:
        return image
    if method == "area":
        return tf_image.area(pictures.to_array(image), *size)
    out = pictures.to_pillow(image).resize(size[::-1], _FILTERS[method])
    return out if isinstance(image, Image.Image) else pictures.to_array(out)


def resized(old: Size, height: int, width: int = 0, method: str = "bilinear", op: str = "resize") -> Size:
    """The output size of `resize`. Raises UserError naming `op` if it needs too much memory."""
    h, w = old
    new = (height, width or height)
    if old == new:
        return new
    nbytes = 8 * new[0] * new[1]
    if method == "area":
        nbytes += 8 * 4 * new[0] * w  # float64, after the first of two passes
    else:
        # Pillow holds 4 bytes per pixel, may resize the width first, and tabulates float64 weights.
        nbytes += 4 * h * new[1] + 8 * _SUPPORT * (max(h, new[0]) + max(w, new[1]))
    memory.require_for_op(op, old, new, nbytes)
    decode_cost.check_pixels(max(h, new[0]) * new[1])
    return new


def resize_small(image: Picture, size: int, method: str = "bilinear", like: str = "tensorflow") -> Picture:
    """Resizes the shorter side to `size`, keeping the aspect ratio.

    The longer side is rounded to the nearest pixel, as in TensorFlow recipes, or truncated with `like="torchvision"`.
    Raises UserError if it needs more memory than an op may take.
    """
    pictures.check_size("resize_small", size=size)
    return resize(image, *resized_small(pictures.size_of(image), size, method, like), method)


def resized_small(old: Size, size: int, method: str = "bilinear", like: str = "tensorflow") -> Size:
    """The output size of `resize_small`. Raises UserError if it needs too much memory."""
    h, w = old
    if _as_torchvision(like):
        new = (size, size * w // h) if h <= w else (size * h // w, size)
    else:
        scale = size / min(h, w)
        new = max(size, round(h * scale)), max(size, round(w * scale))
    return resized(old, *new, method, "resize_small")


def central_crop(image: Picture, height: int, width: int = 0, like: str = "tensorflow") -> Picture:
    """Crops the central (height, width), or (height, height).

    An odd margin has its smaller half above and left. With `like="torchvision"`, half the margin is rounded to even.
    """
    pictures.check_size("central_crop", height=height, width=width or height)
    h, w = pictures.size_of(image)
    height, width = centrally_cropped((h, w), height, width)
    top, left = (h - height) // 2, (w - width) // 2
    if _as_torchvision(like):
        top, left = round((h - height) / 2), round((w - width) / 2)
    return pictures.crop(image, top, left, height, width)


def centrally_cropped(old: Size, height: int, width: int = 0, **_: object) -> Size:
    """The output size of `central_crop`. Raises UserError if the image is smaller."""
    (h, w), width = old, width or height
    if height > h or width > w:
        raise UserError(f"central_crop({height}, {width}): the image has only {h} by {w} pixels; resize it first")
    return height, width


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


def _fixed(old: Size, height: int, width: int = 0, **_: object) -> Size:
    """The output size of a random crop, which fits any image; its own memory depends on its draw."""
    return height, width or height


# (size of the image, **arguments of the op) → output size, of each op; raises UserError if the op would refuse.
SIZES: Mapping[str, Callable[..., Size]] = {
    "resize": resized,
    "resize_small": resized_small,
    "central_crop": centrally_cropped,
    "random_resized_crop": _fixed,
    "inception_crop": _fixed,
}

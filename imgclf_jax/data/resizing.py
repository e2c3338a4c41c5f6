"""Host ops that crop and resize, uint8[h, w, c] to uint8[h', w', c], by Pillow.

Each op computes its output size, and refuses one that takes too much memory, before it allocates: see `memory`. So
`SIZES` tells from an image's header what its ops will refuse.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from imgclf_jax.core import kinds, memory
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.data import tf_image

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_REACH = 6  # source pixels to either side that a filter weighs, times 2: lanczos
_LIKE = ("tensorflow", "torchvision")

Size = tuple[int, int]  # height, width


def to_picture(image: np.ndarray) -> Image.Image:
    """uint8[h, w, c] as Pillow's image of 1, 3 or 4 channels."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def resize(image: np.ndarray, height: int, width: int = 0, method: str = "bilinear") -> np.ndarray:
    """Resizes to (height, width), or (height, height); the filter is widened when shrinking (antialiased).

    `method` is nearest, bilinear, bicubic or lanczos, as Pillow defines them, or area, as TensorFlow does. In RGBA
    Pillow weights colours by alpha. Raises UserError where this takes more memory than an op may.
    """
    if method not in (*_FILTERS, "area"):
        raise UserError(f"resize(method={method!r}): allowed: {', '.join(_FILTERS)}, area")
    size = resized(image.shape[:2], height, width, method)
    if image.shape[:2] == size:
        return image
    if method == "area":
        return tf_image.area(image, *size)
    out = np.asarray(to_picture(image).resize(size[::-1], _FILTERS[method]))
    return out[..., None] if out.ndim == 2 else out


def resized(old: Size, height: int, width: int = 0, method: str = "bilinear", op: str = "resize") -> Size:
    """The size that `resize` gives. Raises UserError, which names `op`, where it takes too much memory."""
    h, w = old
    new = (height, width or height)
    if old == new:
        return new
    nbytes = 8 * new[0] * new[1]
    if method == "area":
        nbytes += 8 * 4 * new[0] * w  # float64, after the first of two passes
    else:
        # Pillow holds 4 bytes a pixel, may resize the width first, and tabulates float64 weights.
        nbytes += 4 * h * new[1] + 8 * _REACH * (max(h, new[0]) + max(w, new[1]))
    memory.require_for_op(op, old, new, nbytes)
    return new


def resize_small(image: np.ndarray, size: int, method: str = "bilinear", like: str = "tensorflow") -> np.ndarray:
    """Resizes so that the shorter side is `size`, keeping the aspect ratio.

    The longer side is rounded to the nearest pixel, as TensorFlow recipes do, or cut off with `like="torchvision"`.
    Raises UserError where this takes more memory than an op may.
    """
    return resize(image, *resized_small(image.shape[:2], size, method, like), method)


def resized_small(old: Size, size: int, method: str = "bilinear", like: str = "tensorflow") -> Size:
    """The size that `resize_small` gives. Raises UserError where it takes too much memory."""
    h, w = old
    if _as_torchvision(like):
        new = (size, size * w // h) if h <= w else (size * h // w, size)
    else:
        scale = size / min(h, w)
        new = max(size, round(h * scale)), max(size, round(w * scale))
    return resized(old, *new, method, "resize_small")


def central_crop(image: np.ndarray, height: int, width: int = 0, like: str = "tensorflow") -> np.ndarray:
    """The central (height, width), or (height, height).

    Of an odd margin the smaller half is above and left. With `like="torchvision"`, half of the margin is rounded to the
    even number.
    """
    h, w = image.shape[:2]
    width = width or height
    if height > h or width > w:
        raise UserError(f"central_crop({height}, {width}) of an image of {h} by {w}; resize it first")
    top, left = (h - height) // 2, (w - width) // 2
    if _as_torchvision(like):
        top, left = round((h - height) / 2), round((w - width) / 2)
    return image[top : top + height, left : left + width]


def _as_torchvision(like: str) -> bool:
    if like not in _LIKE:
        raise UserError(unknown("value of like", like, _LIKE))
    return like == "torchvision"


@kinds.random
def random_resized_crop(
    rng: np.random.Generator,
    image: np.ndarray,
    height: int,
    width: int = 0,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    method: str = "bilinear",
) -> np.ndarray:
    """A crop of random area and aspect ratio, resized to (height, width) (Szegedy et al. 2014, arXiv:1409.4842).

    The area is uniform in `scale` (of the image's), the ratio w / h log-uniform in `ratio`; after ten draws that do
    not fit, the largest central crop within `ratio`.
    """
    h, w = image.shape[:2]
    for _ in range(10):
        area = h * w * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_h, crop_w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < crop_h <= h and 0 < crop_w <= w:
            top, left = rng.integers(0, h - crop_h + 1), rng.integers(0, w - crop_w + 1)
            break
    else:
        crop_w = max(1, round(h * ratio[1])) if w / h > ratio[1] else w
        crop_h = max(1, round(w / ratio[0])) if w / h < ratio[0] else h
        top, left = (h - crop_h) // 2, (w - crop_w) // 2
    return resize(image[top : top + crop_h, left : left + crop_w], height, width or height, method)


def _fixed(old: Size, height: int, width: int = 0, **_: object) -> Size:
    """The size that a crop gives; its own memory depends on what it draws."""
    return height, width or height


# Of each op here: (size of the image, its own arguments) → the size that it gives; UserError if it would refuse.
SIZES: Mapping[str, Callable[..., Size]] = {
    "resize": resized,
    "resize_small": resized_small,
    "central_crop": _fixed,
    "random_resized_crop": _fixed,
    "inception_crop": _fixed,
}

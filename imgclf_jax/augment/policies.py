"""Augmentation policies: RandAugment, TrivialAugment and color jitter, with an op and magnitude drawn per image.

Each op is an affine map, a lookup table of 256 levels per channel, or a blend with the grey or smoothed image. A batch
goes through one pass of each, which is the identity for images that drew another op.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.augment import big_vision, geometry, photometric
from imgclf_jax.core import kinds
from imgclf_jax.core.errors import UserError, check_choice
from imgclf_jax.core.platform import cpu_barrier

# In the order of torchvision's policies.
OPS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
BINS = 31  # magnitudes 0, the weakest, to 30


@dataclass(frozen=True)
class Ranges:
    """The strength of each op at magnitude 30; m has m / 30 of it. Solarize inverts values from 256 (1 - m / 30)."""

    shear: float  # pixels sideways per pixel
    x: float  # translation in pixels
    y: float
    degrees: float  # of rotation; 135 at most
    enhance: float  # brightness, color, contrast and sharpness: the factor's distance from 1
    posterize: float  # bits removed


class Strengths(NamedTuple):
    """The parameters of each op, sign and magnitude, [op, sign, magnitude], or of each image, [b]."""

    matrix: jax.Array  # i32[…, 6], for `geometry.affine`
    factor: jax.Array  # f32[…], of the blends
    level: jax.Array  # i32[…]: posterize's bits, solarize's threshold


def strengths(ranges: Ranges, height: int, width: int) -> Strengths:
    """The table of all ops, signs (+, -) and magnitudes, for images of this size."""
    shape = (len(OPS), 2, BINS)
    matrix, factor, level = np.zeros((*shape, 6), np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for index in np.ndindex(shape):
        op, part = OPS[index[0]], (1 - 2 * index[1]) * index[2] / (BINS - 1)
        matrix[index] = geometry.fixed_point(_map(op, part, ranges, height, width))
        factor[index] = 1 + part * ranges.enhance
        part = abs(part)
        level[index] = 8 - round(part * ranges.posterize) if op == "posterize" else math.ceil(256 * (1 - part))
    return Strengths(jnp.asarray(matrix), jnp.asarray(factor), jnp.asarray(level))


def _map(op: str, part: float, ranges: Ranges, height: int, width: int) -> geometry.Matrix:
    """The affine map of an op. Shears are about the top left corner (Cubuk et al. 2019, torchvision)."""
    shear, x, y = part * ranges.shear, math.trunc(part * ranges.x), math.trunc(part * ranges.y)
    maps: dict[str, geometry.Matrix] = {
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, x, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, y),
        "rotate": geometry.rotate(part * ranges.degrees, height, width),
    }
    return maps.get(op, geometry.IDENTITY)


def apply(images: jax.Array, op: jax.Array, strength: Strengths, fill: jax.Array) -> jax.Array:
    """Applies to each image of uint8[b, h, w, c] its own op, an index i32[b] into OPS; `fill` uint8[c] the border."""
    levels = jnp.broadcast_to(jnp.arange(256, dtype=jnp.uint8)[:, None, None], (len(images), 256, 1, 1))
    tables = {
        "brightness": photometric.brightness(levels, strength.factor),
        "contrast": photometric.blend(photometric.mean_grey(images), levels, strength.factor),
        "posterize": photometric.posterize(levels, jnp.clip(strength.level, 1, 8)),
        "solarize": photometric.solarize(levels, strength.level),
        "autocontrast": photometric.stretch(levels, *photometric.extremes(images)),
        "equalize": photometric.equalization(images)[:, :, None],
    }  # uint8[b, 256, 1, 1 or c]
    images = photometric.apply_ops(images, op, OPS, tables, strength.factor)
    return geometry.affine(images, strength.matrix, fill)


def _draw_and_apply(
    key: jax.Array, images: jax.Array, ranges: Ranges, magnitude: Callable[[jax.Array], jax.Array], fill: jax.Array
) -> jax.Array:
    b, h, w, _ = images.shape
    key_op, key_sign, key_magnitude = jax.random.split(key, 3)
    op = jax.random.randint(key_op, (b,), 0, len(OPS))
    index = op, jax.random.randint(key_sign, (b,), 0, 2), magnitude(key_magnitude)
    return apply(images, op, Strengths(*(values[index] for values in strengths(ranges, h, w))), fill)


@kinds.random
def randaugment(
    key: jax.Array, images: jax.Array, num_ops: int = 2, magnitude: int = 9, magnitude_std: float = 0.0,
    fill: photometric.Fill | None = None, ops: str = "torchvision",
) -> jax.Array:  # fmt: skip
    """Applies `num_ops` random ops per image, in sequence (RandAugment, Cubuk et al. 2019, arXiv:1909.13719).

    - `ops` names the set. "torchvision" has the 14 OPS with a `magnitude` of 0 to 30: at 30 shear 0.3, translation
      150/331 of the side, 30 degrees, factors 1 ± 0.9, 4 bits; the solarize threshold is 256 (1 - m / 30), there
      255 (1 - m / 30). "big_vision" has that codebase's 16 ops, with a magnitude of 0 to 10: see `augment.big_vision`.
    - `magnitude_std` is the standard deviation of normal noise on the magnitude, then rounded and clipped to 0 … 30.
    - `fill`, 0 to 255, one or one per channel, fills the border: 0 by default, 128 for "big_vision".

    Put it before `normalize`, on uint8.
    """
    photometric.check("randaugment", images)
    check_choice("randaugment ops", ops, ("torchvision", "big_vision"))
    default_fill, strongest = (0, BINS - 1) if ops == "torchvision" else (big_vision.FILL, big_vision.FULL)
    fill_colors = photometric.fill_values("randaugment", images, default_fill if fill is None else fill)
    if magnitude not in range(strongest + 1) or (magnitude_std and ops == "big_vision"):
        raise UserError(f"randaugment(magnitude={magnitude}, magnitude_std={magnitude_std}, ops={ops!r}): magnitude "
                        f"must be a whole number from 0 to {strongest}, without noise for 'big_vision'")  # fmt: skip
    if ops == "big_vision":
        return big_vision.randaugment(key, images, num_ops, magnitude, fill_colors)
    b, h, w, _ = images.shape
    ranges = Ranges(0.3, 150 / 331 * w, 150 / 331 * h, 30.0, 0.9, 4)

    def draw(key: jax.Array) -> jax.Array:
        noise = magnitude_std * jax.random.normal(key, (b,)) if magnitude_std else jnp.zeros(b)
        return jnp.clip(jnp.round(magnitude + noise), 0, BINS - 1).astype(jnp.int32)

    for i in range(num_ops):
        images = cpu_barrier(images)
        images = _draw_and_apply(jax.random.fold_in(key, i), images, ranges, draw, fill_colors)
    return images


@kinds.random
def trivialaugment(key: jax.Array, images: jax.Array, fill: photometric.Fill = 0) -> jax.Array:
    """Applies one random op per image, with a magnitude uniform over 0 to 30 (TrivialAugment, "wide").

    Müller and Hutter 2021, arXiv:2103.10158. The ranges are torchvision's: at 30 shear 0.99, translation 32 pixels, 135
    degrees, factors 1 ± 0.99, 6 bits, solarize threshold 0; that threshold is as in `randaugment`. `fill`, 0 to 255,
    one or one per channel, fills the border. Put it before `normalize`, on uint8.
    """
    photometric.check("trivialaugment", images)
    ranges = Ranges(0.99, 32.0, 32.0, 135.0, 0.99, 6)
    draw = functools.partial(jax.random.randint, shape=images.shape[:1], minval=0, maxval=BINS)
    return _draw_and_apply(key, images, ranges, draw, photometric.fill_values("trivialaugment", images, fill))


@kinds.random
def color_jitter(
    key: jax.Array, images: jax.Array, brightness: float | tuple[float, float] = 0.0,
    contrast: float | tuple[float, float] = 0.0, saturation: float | tuple[float, float] = 0.0,
    hue: float | tuple[float, float] = 0.0,
) -> jax.Array:  # fmt: skip
    """Changes brightness, contrast, saturation and hue by random factors, in this order (torchvision's is random).

    Each factor is drawn per image, uniformly from [max(0, 1 - x), 1 + x] or from a pair (low, high); `hue` from
    [-x, x], with x at most 0.5, half a turn. The arithmetic is Pillow's, except for the hue, which is not rounded to 8
    bits in between. Grey images keep their saturation and hue. Put it before `normalize`, on uint8.
    """
    photometric.check("color_jitter", images)
    amounts = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    ops = (photometric.brightness, photometric.contrast, photometric.color, photometric.hue)
    for i, ((name, value), op) in enumerate(zip(amounts.items(), ops, strict=True)):
        middle, least, most = (0.0, -0.5, 0.5) if name == "hue" else (1.0, 0.0, math.inf)
        low, high = value if isinstance(value, tuple) else (max(least, middle - value), middle + value)
        if not least <= low <= high <= most:
            raise UserError(f"color_jitter({name}={value}): its range must lie within {least} and {most}")
        if (low, high) != (middle, middle):
            drawn = jax.random.uniform(jax.random.fold_in(key, i), images.shape[:1], minval=low, maxval=high)
            if name == "hue":  # fusion would recompute the colors for each use
                images = cpu_barrier(images)
            images = op(images, drawn)
    return images

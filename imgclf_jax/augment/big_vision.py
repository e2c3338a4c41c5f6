"""RandAugment of google-research/big_vision: `randaug` of pp/autoaugment.py, with TensorFlow's arithmetic.

It differs from torchvision's policies (`augment.policies`) in its ops, their strengths and rounding. A magnitude of 10
is full strength. `docs/recipes.md` compares each op with the original. It keeps these deviations from Pillow:

- `contrast` blends with the level h * w / 256, at most 255, instead of the mean level.
- `solarize` has a uint8 threshold, which at full strength wraps from 256 to 0 and inverts every pixel.
- `posterize` keeps more bits at a greater magnitude.
- `color`, `contrast`, `brightness` and `sharpness` draw no sign: at full strength their factor is always 1.9.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.augment import geometry, photometric
from imgclf_jax.core.platform import cpu_barrier

# In the order of big_vision, which draws one per image, uniformly.
OPS = (
    "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "color", "contrast", "brightness",
    "sharpness", "shear_x", "shear_y", "translate_x", "translate_y", "cutout", "solarize_add",
)  # fmt: skip
FULL = 10  # the magnitude of full strength
FILL = 128

_DEGREES, _SHEAR, _TRANSLATION, _CUTOUT, _ADDITION = 30.0, 0.3, 100.0, 40, 110  # at full strength; lengths in pixels


def randaugment(key: jax.Array, images: jax.Array, num_ops: int, magnitude: int, fill: jax.Array) -> jax.Array:
    """Applies `num_ops` ops to each image of uint8[b, h, w, c], in sequence; `fill` uint8[c] fills the border."""
    b, h, w, _ = images.shape
    for i in range(num_ops):
        key_op, key_sign, key_y, key_x = jax.random.split(jax.random.fold_in(key, i), 4)
        op = jax.random.randint(key_op, (b,), 0, len(OPS))
        negative = jax.random.randint(key_sign, (b,), 0, 2)
        centre = jax.random.randint(key_y, (b,), 0, h), jax.random.randint(key_x, (b,), 0, w)
        images = apply(cpu_barrier(images), op, negative, centre, magnitude, fill)
    return images


def apply(
    images: jax.Array, op: jax.Array, negative: jax.Array, centre: tuple[jax.Array, jax.Array], magnitude: int,
    fill: jax.Array,
) -> jax.Array:  # fmt: skip
    """Applies to each image of uint8[b, h, w, c] its own op, an index i32[b] into OPS.

    `negative` i32[b] is 1 to rotate, shear or translate the other way; `centre`, (y, x) i32[b], is that of the cutout.
    """
    b, h, w, _ = images.shape
    part = magnitude / FULL
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(1, 256, 1, 1)
    factor = jnp.full(b, part * 1.8 + 0.1, jnp.float32)
    shift = min(8 - int(part * 4), 7)  # TensorFlow shifts a byte by 7 at most
    tables = {
        "autocontrast": photometric.stretch(levels, *photometric.extremes(images), tensorflow=True),
        "equalize": photometric.equalization(images)[:, :, None],
        "invert": 255 - levels,
        "posterize": levels >> shift << shift,
        "solarize": photometric.solarize(levels, jnp.full(1, int(part * 256) % 256)),
        "contrast": photometric.blend(jnp.full_like(levels, min(h * w // 256, 255)), levels, factor[:1]),
        "brightness": photometric.brightness(levels, factor[:1]),
        "solarize_add": jnp.where(levels < 128, levels + jnp.uint8(int(part * _ADDITION)), levels),  # 127 + 110 < 256
    }  # uint8[b or 1, 256, 1, 1 or c]
    images = photometric.apply_ops(images, op, OPS, tables, factor, tensorflow=True)
    images = geometry.affine(images, jnp.asarray(_maps(magnitude, h, w))[op, negative], fill)
    (y, x), side = centre, int(part * _CUTOUT)
    inside = geometry.in_box(h, w, y - side, x - side, y + side, x + side)
    return jnp.where((op == OPS.index("cutout"))[:, None, None, None] & inside, fill, images)


def _maps(magnitude: int, height: int, width: int) -> np.ndarray:
    """f32[op, 2, 6]: the affine map of each op, positive and negative, as in `augment.geometry`."""
    maps = np.tile(np.array(geometry.IDENTITY, np.float32), (len(OPS), 2, 1))
    for negative in range(2):
        part = np.float32((1 - 2 * negative) * magnitude / FULL)
        sheared, moved = part * np.float32(_SHEAR), part * np.float32(_TRANSLATION)
        for name, index, value in (("shear_x", 1, sheared), ("shear_y", 3, sheared), ("translate_x", 2, moved),
                                   ("translate_y", 5, moved)):  # fmt: skip
            maps[OPS.index(name), negative, index] = value
        angle = np.float32(part * np.float32(_DEGREES)) * np.float32(math.pi / 180)
        cos, sin, right, bottom = np.cos(angle), np.sin(angle), np.float32(width - 1), np.float32(height - 1)
        x = (right - (cos * right - sin * bottom)) / 2
        y = (bottom - (sin * right + cos * bottom)) / 2
        maps[OPS.index("rotate"), negative] = cos, -sin, x, sin, cos, y
    return maps

"""Affine maps of uint8 images with Pillow's arithmetic: nearest neighbour, coordinates in 16.16 fixed point.

A map takes output to input coordinates, as in `Image.transform(AFFINE)`: x_in = a x + b y + c, y_in = d x + e y + f,
with pixel centres at halves. `fixed_point` computes it in NumPy float64, so it is the same on every device.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.augment import tpu_affine
from imgclf_jax.core import platform

Matrix = tuple[float, float, float, float, float, float]  # a, b, c, d, e, f

IDENTITY: Matrix = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def rotate(degrees: float, height: int, width: int) -> Matrix:
    """Rotates counter-clockwise about the centre, as `Image.rotate` does."""
    angle, x, y = -math.radians(degrees), width / 2, height / 2
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    return (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)


def fixed_point(matrix: Matrix) -> np.ndarray:
    """i32[6] in units of 2**-16, including the half-pixel centres; for sides of up to 32,767 pixels."""
    a, b, c, d, e, f = matrix
    centred = np.array([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2])
    return np.floor(centred * 65536 + 0.5).astype(np.int32)


def in_box(height: int, width: int, top: jax.Array, left: jax.Array, bottom: jax.Array, right: jax.Array) -> jax.Array:
    """Whether each pixel is in the box of its image, bool[b, h, w, 1]. The edges are i32[b], the last two exclusive."""
    y, x = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
    top, left, bottom, right = (edge[:, None, None, None] for edge in (top, left, bottom, right))
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def affine(images: jax.Array, matrix: jax.Array, fill: jax.Array, limits: tpu_affine.Limits) -> jax.Array:
    """Applies to each image of [b, h, w, c] its map i32[b, 6] of `fixed_point`; `fill` [c] is read outside.

    `limits` are as for `read`.
    """
    h, w = images.shape[1:3]
    y, x = jnp.arange(h, dtype=jnp.int32)[:, None], jnp.arange(w, dtype=jnp.int32)

    def coordinate(row: jax.Array) -> jax.Array:  # i32[b, 3] → i32[b, h, w]
        return (row[:, 0, None, None] * x + row[:, 1, None, None] * y + row[:, 2, None, None]) >> 16

    # Truncation is rounding of half a pixel less.
    rounded = matrix.astype(jnp.float32) / 65536 - jnp.array([0, 0, 0.5, 0, 0, 0.5], jnp.float32)
    return read(images, coordinate(matrix[:, 3:]), coordinate(matrix[:, :3]), fill, rounded, limits)


def read(
    images: jax.Array, y: jax.Array, x: jax.Array, fill: jax.Array, matrix: jax.Array,
    limits: tpu_affine.Limits,
) -> jax.Array:  # fmt: skip
    """Reads each image [b, h, w, c] at rows y and columns x, i32[b, h, w]; `fill` [c] outside the image.

    A TPU reads the same pixels without a gather, by the maps `matrix` f32[b, 6] and their limits: see `tpu_affine`.
    """
    if platform.current() == "tpu":
        return tpu_affine.read(images, y, x, fill, matrix, limits)
    b, h, w, c = images.shape
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    source = jnp.where(inside, y * w + x, 0).reshape(b, h * w)
    gather = jax.vmap(lambda image, index: image.at[index].get(mode="promise_in_bounds"))
    pixels = gather(images.reshape(b, h * w, c), source)
    return jnp.where(inside[..., None], pixels.reshape(images.shape), fill)

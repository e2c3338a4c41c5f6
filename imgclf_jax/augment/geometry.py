"""Affine maps of uint8 images with Pillow's arithmetic: nearest neighbour, coordinates in 16.16 fixed point.

A map says for each output pixel where in the input it is read, as `Image.transform(AFFINE)` does: x_in = a x + b y + c,
y_in = d x + e y + f, pixel centres at halves. `fixed_point` prepares a map by NumPy in float64, so that it is the same
on every device.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.augment import tpu_affine
from imgclf_jax.core import platform

Matrix = tuple[float, float, float, float, float, float]  # a, b, c, d, e, f

IDENTITY: Matrix = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def shear_x(amount: float) -> Matrix:
    """Row y is read `amount` * y to the right: the origin, top left, stays (Cubuk et al. 2019, torchvision)."""
    return (1.0, amount, 0.0, 0.0, 1.0, 0.0)


def shear_y(amount: float) -> Matrix:
    """Column x is read `amount` * x further down."""
    return (1.0, 0.0, 0.0, amount, 1.0, 0.0)


def translate(x: float, y: float) -> Matrix:
    """Every pixel is read (x, y) pixels to the right and down: the picture moves left and up."""
    return (1.0, 0.0, x, 0.0, 1.0, y)


def rotate(degrees: float, height: int, width: int) -> Matrix:
    """Turns counter-clockwise about the centre, as `Image.rotate` does."""
    angle, x, y = -math.radians(degrees), width / 2, height / 2
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    return (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)


def fixed_point(matrix: Matrix) -> np.ndarray:
    """i32[6] in units of 2**-16, the half pixel of the centres included; good for images of up to 32,767 pixels."""
    a, b, c, d, e, f = matrix
    centred = np.array([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2])
    return np.floor(centred * 65536 + 0.5).astype(np.int32)


def affine(images: jax.Array, matrix: jax.Array, fill: jax.Array, limits: tpu_affine.Limits | None = None) -> jax.Array:
    """Each image of [b, h, w, c] under its map, i32[b, 6] of `fixed_point`; `fill` [c] where it reads outside.

    `limits` are those of `read`.
    """
    h, w = images.shape[1:3]
    y, x = jnp.arange(h, dtype=jnp.int32)[:, None], jnp.arange(w, dtype=jnp.int32)

    def coordinate(row: jax.Array) -> jax.Array:  # i32[b, 3] → i32[b, h, w]
        return (row[:, 0, None, None] * x + row[:, 1, None, None] * y + row[:, 2, None, None]) >> 16

    # To cut off is to round what is half a pixel less.
    about = matrix.astype(jnp.float32) / 65536 - jnp.array([0, 0, 0.5, 0, 0, 0.5], jnp.float32)
    return read(images, coordinate(matrix[:, 3:]), coordinate(matrix[:, :3]), fill, about, limits)


def read(
    images: jax.Array,
    y: jax.Array,
    x: jax.Array,
    fill: jax.Array,
    matrix: jax.Array,
    limits: tpu_affine.Limits | None = None,
) -> jax.Array:
    """The pixels of each image [b, h, w, c] at rows y and columns x, i32[b, h, w]; `fill` [c] outside the image.

    `matrix` f32[b, 6] and `limits` describe the maps for TPU, which takes another way to the same pixels if these are
    given: see `tpu_affine`.
    """
    if platform.current() == "tpu" and limits is not None:
        return tpu_affine.read(images, y, x, fill, matrix, limits)
    b, h, w, c = images.shape
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    source = jnp.where(inside, y * w + x, 0).reshape(b, h * w)
    pixels = jax.vmap(lambda image, at: image.at[at].get(mode="promise_in_bounds"))(images.reshape(b, h * w, c), source)
    return jnp.where(inside[..., None], pixels.reshape(images.shape), fill)

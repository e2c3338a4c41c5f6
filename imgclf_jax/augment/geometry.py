"""Affine maps of uint8 images, nearest neighbour, with Pillow's arithmetic in 16.16 fixed point or TensorFlow's.

A map takes output to input coordinates, as in `Image.transform(AFFINE)`: x_in = a x + b y + c, y_in = d x + e y + f,
with pixel centres at halves. `fixed_point` computes it in NumPy float64, so it is the same on every device.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.augment import photometric
from imgclf_jax.core import platform

Matrix = tuple[float, float, float, float, float, float]  # a, b, c, d, e, f

IDENTITY: Matrix = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_ONE = 2**16  # fixed point, so that fusion cannot change any rounding


def rotate(degrees: float, height: int, width: int) -> Matrix:
    """Rotates counter-clockwise about the centre, as `Image.rotate` does."""
    angle, x, y = -math.radians(degrees), width / 2, height / 2
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    return (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)


def fixed_point(matrix: Matrix) -> np.ndarray:
    """i32[6] in units of 2**-16, including the half-pixel centres; for sides of up to 32,767 pixels."""
    a, b, c, d, e, f = matrix
    centred = np.array([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2])
    return np.floor(centred * _ONE + 0.5).astype(np.int32)


def in_box(height: int, width: int, top: jax.Array, left: jax.Array, bottom: jax.Array, right: jax.Array) -> jax.Array:
    """Whether each pixel is in the box of its image, bool[b, h, w, 1]. The edges are i32[b], the last two exclusive."""
    y, x = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
    top, left, bottom, right = (edge[:, None, None, None] for edge in (top, left, bottom, right))
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def affine(images: jax.Array, matrix: jax.Array, fill: jax.Array) -> jax.Array:
    """Applies to each image of uint8[b, h, w, c], c at most 3, its map [b, 6]; `fill` [c] is read outside.

    Maps i32 of `fixed_point` are computed as in Pillow. Maps f32 take pixel indices to pixel indices as in TensorFlow's
    `ImageProjectiveTransformV3`, in float32 and with halves rounded away from zero. Each map is a shear or a
    translation along one axis, or a rotation about the centre by up to 135 degrees.
    """
    b, h, w, c = images.shape
    rows, columns = jnp.arange(h, dtype=matrix.dtype)[:, None], jnp.arange(w, dtype=matrix.dtype)

    def coordinate(row: jax.Array) -> jax.Array:  # [b, 3] → i32[b, h, w]
        of_x, of_y, start = (row[:, i, None, None] for i in range(3))
        if matrix.dtype == jnp.int32:
            return (of_x * columns + of_y * rows + start) >> 16
        at = photometric.rounded_product(of_x, columns) + photometric.rounded_product(of_y, rows) + start
        return jax.lax.round(at, jax.lax.RoundingMethod.AWAY_FROM_ZERO).astype(jnp.int32)

    x, y = coordinate(matrix[:, :3]), coordinate(matrix[:, 3:])
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    if platform.current() == "tpu":
        if matrix.dtype == jnp.int32:  # which truncates: rounds half a pixel less
            matrix = matrix.astype(jnp.float32) / _ONE - jnp.array([0, 0, 0.5, 0, 0, 0.5], jnp.float32)
        pixels = _read_by_slides(images, y, x, matrix)
    else:
        source = jnp.where(inside, y * w + x, 0).reshape(b, h * w)
        gather = jax.vmap(lambda image, index: image.at[index].get(mode="promise_in_bounds"))
        pixels = gather(images.reshape(b, h * w, c), source).reshape(images.shape)
    return jnp.where(inside[..., None], pixels, fill)


def _read_by_slides(images: jax.Array, y: jax.Array, x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Pixels [b, h, w, c] at rows y and columns x, the rounded coordinates of a map f32[b, 6]; arbitrary outside.

    It has no gather, which is slow on TPU. A rotation is three shears, of rows, of columns, and of rows again (Paeth
    1986, "A fast algorithm for general raster rotation"), each a slide of whole lines by whole pixels. No pixel is
    lost, each ends within two pixels of its target, and integers tell where: a selection among 25 neighbours equals a
    gather, bit for bit. A rotation by over 45 degrees is a turn by 90 and a rest; a shear or translation is one slide.
    """
    h, w, c = images.shape[1:]
    side, near = max(h, w), 2
    margin = side // 4 + near + 1  # so far outside the image a pixel may lie between two slides, at 45 degrees
    packed = sum((images[..., i].astype(jnp.uint32) << 8 * i for i in range(1, c)), images[..., 0].astype(jnp.uint32))
    packed = jnp.pad(packed, ((0, 0), (0, side - h), (0, side - w)))
    to_x, to_y = matrix[:, :3], matrix[:, 3:]
    quarter = jnp.where(jnp.abs(to_y[:, 0]) > to_x[:, 0], jnp.sign(to_y[:, 0]), 0)

    def turned(none: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
        number = photometric.broadcast_along_batch(quarter, none)
        return jnp.where(number == 0, none, jnp.where(number > 0, positive, negative))

    across, last = packed.swapaxes(1, 2), jnp.array([0, 0, side - 1], jnp.float32)
    packed = turned(packed, across[:, ::-1], across[:, :, ::-1])
    y, x = turned(y, side - 1 - x, x), turned(x, y, side - 1 - y)
    to_y, to_x = turned(to_y, last - to_x, to_x), turned(to_x, to_y, last - to_y)

    (a, b, c_x), (d, _, f) = to_x.T, to_y.T
    rotates = (b != 0) & (d != 0)
    half = jnp.where(rotates, -d / (1 + a), 0)  # the tangent of half the angle, with its sign
    first, third = jnp.where(rotates, half, b), -half * ((h - 1) / 2)  # the middle row stays
    lines = [(first, c_x - third - first * f), (d, f - d * third), (half, third)]  # slopes and intercepts
    fixed = jnp.round(jnp.array(lines) * _ONE).astype(jnp.int32)

    def amount(i: int, line: jax.Array) -> jax.Array:  # pixels by which slide i moves this line
        slope, start = (photometric.broadcast_along_batch(v, line) for v in fixed[i])
        return (slope * line + start + _ONE // 2) >> 16

    rows, columns = jnp.arange(-near, side + near)[None], jnp.arange(-margin, side + margin)[None]
    moved = jnp.pad(packed, ((0, 0), (near, near), (margin, margin)))
    moved = _slide(moved, amount(0, rows)[:, :, None], 2)
    moved = _slide(moved, amount(1, columns)[:, None], 1)
    moved = _slide(moved, amount(2, rows)[:, :, None], 2)
    # Where the pixel at row y and column x is now, from its target.
    column = x - amount(0, y)
    row = y - amount(1, column)
    dy, dx = row - jnp.arange(h)[:, None], column - amount(2, row) - jnp.arange(w)
    out = jnp.zeros(y.shape, jnp.uint32)
    for i, j in itertools.product(range(-near, near + 1), repeat=2):
        top, left = near + i, margin + j
        out = jnp.where((dy == i) & (dx == j), moved[:, top : top + h, left : left + w], out)
    return jnp.stack([(out >> 8 * i).astype(jnp.uint8) for i in range(c)], -1)


def _slide(lines: jax.Array, amount: jax.Array, axis: int) -> jax.Array:
    """out[i] = lines[i + amount] along the axis, modulo its length; `amount` i32 has one element along the axis."""
    n = lines.shape[axis]
    amount %= n
    for bit in range(n.bit_length()):  # a selection for each bit, not a gather
        lines = jnp.where(amount >> bit & 1 == 1, jnp.roll(lines, -(2**bit), axis), lines)
    return lines

"""Affine maps of uint8 images with Pillow's arithmetic: nearest neighbour, coordinates in 16.16 fixed point.

A map takes output to input coordinates, as in `Image.transform(AFFINE)`: x_in = a x + b y + c, y_in = d x + e y + f,
with pixel centres at halves. `fixed_point` computes it in NumPy float64, so it is the same on every device.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

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
    """Applies to each image of [b, h, w, c] its map i32[b, 6] of `fixed_point`; `fill` [c] is read outside."""
    h, w = images.shape[1:3]
    y, x = jnp.arange(h, dtype=jnp.int32)[:, None], jnp.arange(w, dtype=jnp.int32)

    def coordinate(row: jax.Array) -> jax.Array:  # i32[b, 3] → i32[b, h, w]
        return (row[:, 0, None, None] * x + row[:, 1, None, None] * y + row[:, 2, None, None]) >> 16

    # Truncation is rounding of half a pixel less.
    rounded = matrix.astype(jnp.float32) / _ONE - jnp.array([0, 0, 0.5, 0, 0, 0.5], jnp.float32)
    return read(images, coordinate(matrix[:, 3:]), coordinate(matrix[:, :3]), fill, rounded)


def read(images: jax.Array, y: jax.Array, x: jax.Array, fill: jax.Array, matrix: jax.Array) -> jax.Array:
    """Reads each image of uint8[b, h, w, c], c at most 3, at rows y and columns x, i32[b, h, w]; `fill` [c] outside.

    y and x are the coordinates of `matrix` f32[b, 6] rounded to the nearest integers. Each map is a shear or a
    translation along one axis, or a rotation about the centre by up to 135 degrees.
    """
    b, h, w, c = images.shape
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    if platform.current() == "tpu":
        pixels = _read_by_slides(images, y, x, matrix)
    else:
        source = jnp.where(inside, y * w + x, 0).reshape(b, h * w)
        gather = jax.vmap(lambda image, index: image.at[index].get(mode="promise_in_bounds"))
        pixels = gather(images.reshape(b, h * w, c), source).reshape(images.shape)
    return jnp.where(inside[..., None], pixels, fill)


def _read_by_slides(images: jax.Array, y: jax.Array, x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`read` without a gather, which is slow on TPU; arbitrary outside of the images.

    A rotation is three shears, of rows, of columns, and of rows again (Paeth 1986, "A fast algorithm for general raster
    rotation"), each a slide of whole lines by whole pixels. No pixel is lost, each ends within two pixels of its
    target, and integer arithmetic tells where, so a selection among 25 neighbours equals a gather, bit for bit. A
    rotation by more than 45 degrees is a turn by 90 and a rest; a shear or a translation is one slide.
    """
    h, w, c = images.shape[1:]
    side, near = max(h, w), 2
    margin = side // 4 + near + 1  # so far outside the image a pixel may lie between two slides, at 45 degrees
    packed = sum((images[..., i].astype(jnp.uint32) << 8 * i for i in range(1, c)), images[..., 0].astype(jnp.uint32))
    packed = jnp.pad(packed, ((0, 0), (0, side - h), (0, side - w)))
    to_x, to_y = matrix[:, :3], matrix[:, 3:]
    quarter = jnp.where(jnp.abs(to_y[:, 0]) > to_x[:, 0], jnp.sign(to_y[:, 0]), 0)

    def turned(none: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
        number = quarter.reshape(-1, *[1] * (none.ndim - 1))
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
    fixed = [[jnp.round(v * _ONE).astype(jnp.int32) for v in line] for line in lines]

    def amount(i: int, line: jax.Array) -> jax.Array:  # pixels by which slide i moves this line
        slope, start = (v.reshape(-1, *[1] * (line.ndim - 1)) for v in fixed[i])
        return (slope * line + start + _ONE // 2) >> 16

    rows, columns = jnp.arange(-near, side + near)[None], jnp.arange(-margin, side + margin)[None]
    moved = jnp.pad(packed, ((0, 0), (near, near), (margin, margin)))
    moved = slide(moved, amount(0, rows)[:, :, None], 2)
    moved = slide(moved, amount(1, columns)[:, None], 1)
    moved = slide(moved, amount(2, rows)[:, :, None], 2)
    # Where the pixel at row y and column x is now, from its target.
    column = x - amount(0, y)
    row = y - amount(1, column)
    dy, dx = row - jnp.arange(h)[:, None], column - amount(2, row) - jnp.arange(w)
    out = jnp.zeros(y.shape, jnp.uint32)
    for i, j in itertools.product(range(-near, near + 1), repeat=2):
        top, left = near + i, margin + j
        out = jnp.where((dy == i) & (dx == j), moved[:, top : top + h, left : left + w], out)
    return jnp.stack([(out >> 8 * i).astype(jnp.uint8) for i in range(c)], -1)


def slide(lines: jax.Array, amount: jax.Array, axis: int) -> jax.Array:
    """out[i] = lines[i + amount] along the axis, 0 outside of the lines: a selection for each bit, not a gather.

    `amount`, an integer array, has the rank of the lines and one element along the axis.
    """
    n, padding = lines.shape[axis], [(0, 0)] * lines.ndim
    units = [2**i for i in reversed(range((2 * n).bit_length()))]
    padding[axis] = (n, sum(units) - n)
    lines, amount = jnp.pad(lines, padding), jnp.clip(amount + n, 0, 2 * n)
    for unit in units:
        rest = lines.shape[axis] - unit
        near, far = (jax.lax.slice_in_dim(lines, start, start + rest, axis=axis) for start in (0, unit))
        lines = jnp.where(amount & unit > 0, far, near)
    return lines

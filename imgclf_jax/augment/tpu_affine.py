"""Affine maps of images without a gather, for TPU: three slides of whole lines, then a choice among neighbours.

A TPU reads single pixels at computed places slowly. What it does fast is to slide whole lines, and to choose. A
rotation is three shears (Paeth 1986, "A fast algorithm for general raster rotation"): rows slide, columns slide, rows
slide again. Each slides by whole pixels, so that no pixel is lost, and each comes to lie near its place. The exact map
(`geometry`) says where in the image a pixel is read. The three slides, in whole numbers, say where that pixel lies now,
and it is taken from there. So the result is the same, to the bit, as that of a gather.

A shear or a translation is one slide, and the other two are by 0. A rotation by more than 45 degrees is a turn by 90
degrees, which moves whole pixels too, and the three slides.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from imgclf_jax.augment.tpu_slides import slide

_ONE = 65536  # slides are computed in 16.16 fixed point: the same whole numbers, however the compiler fuses it


@dataclass(frozen=True)
class Limits:
    """The most that the maps of a policy do. A map is a shear, or a translation, or a rotation about the centre."""

    shear: float  # pixels to the side for each pixel
    x: float  # pixels
    y: float
    degrees: float  # of rotation; 135 at most


@dataclass(frozen=True)
class Slides:
    """Three slides one after the other: of rows, of columns, of rows.

    The pixel at row r and column c comes to column c1 = c - amount(0, r), then to row r1 = r - amount(1, c1), then to
    column c1 - amount(2, r1).
    """

    slopes: tuple[jax.Array, ...]  # three i32[b], in units of 1 / _ONE
    starts: tuple[jax.Array, ...]
    bounds: tuple[int, int, int]

    def amount(self, i: int, line: jax.Array) -> jax.Array:
        """By how many pixels these lines, i32[b or 1, …], slide in slide i: i32[b, …], -bound to bound."""
        slope, start = (v.reshape(-1, *[1] * (line.ndim - 1)) for v in (self.slopes[i], self.starts[i]))
        return jnp.clip((slope * line + start) >> 16, -self.bounds[i], self.bounds[i])

    def apply(self, i: int, images: jax.Array, first: int, begin: int, end: int) -> jax.Array:
        """Slide i of images [b, h, w], whose lines count from `first`; what comes to lie at `begin` to `end`."""
        across, bound = (2, 1, 2)[i], self.bounds[i]
        lines = first + jnp.arange(images.shape[3 - across], dtype=jnp.int32)[None]
        amount = jnp.expand_dims(self.amount(i, lines) + bound, across)
        return slide(images, amount, 2 * bound, across, begin - bound, end - bound)


def read(
    images: jax.Array, y: jax.Array, x: jax.Array, fill: jax.Array, matrix: jax.Array, limits: Limits
) -> jax.Array:
    """The pixels of each image [b, h, w, c] at rows y and columns x, i32[b, h, w]; `fill` [c] outside the image.

    `matrix` f32[b, 6] says the same as y and x, which are rounded to the nearest: x = a i + b j + c and
    y = d i + e j + f at column i and row j.
    """
    _, h, w, c = images.shape
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    packed = _pack(images)
    if limits.degrees > 45:
        packed, y, x, matrix = _turn(packed, y, x, matrix)
    return jnp.where(inside[..., None], _unpack(_slide_and_choose(packed, y, x, matrix, limits), c), fill)


def _pack(images: jax.Array) -> jax.Array:
    """uint8[b, h, w, c], c being 4 at most → u32[b, h, w]: the channels of a pixel are moved together."""
    shifted = [images[..., i].astype(jnp.uint32) << (8 * i) for i in range(images.shape[-1])]
    return sum(shifted[1:], shifted[0])


def _unpack(packed: jax.Array, c: int) -> jax.Array:
    return jnp.stack([(packed >> (8 * i)).astype(jnp.uint8) for i in range(c)], -1)


def _turn(packed: jax.Array, y: jax.Array, x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, ...]:
    """Turns images [b, h, w], made square, by 90 degrees where the map does by more than 45; y, x and the map too."""
    h, w = packed.shape[1:]
    side = max(h, w)
    packed = jnp.pad(packed, ((0, 0), (0, side - h), (0, side - w)))
    a, d = matrix[:, 0], matrix[:, 3]
    quarter = jnp.where(jnp.abs(d) > a, jnp.sign(d), 0)[:, None, None]  # -1, 0 or 1

    def choose(stay: jax.Array, one_way: jax.Array, other_way: jax.Array) -> jax.Array:
        return jnp.where(quarter == 0, stay, jnp.where(quarter == 1, one_way, other_way))

    across = packed.swapaxes(1, 2)
    of_x, of_y, last = matrix[:, None, :3], matrix[:, None, 3:], jnp.array([0, 0, side - 1], jnp.float32)
    return (
        choose(packed, across[:, ::-1], across[:, :, ::-1]),
        choose(y, side - 1 - x, x),
        choose(x, y, side - 1 - y),
        jnp.concatenate([choose(of_x, of_y, last - of_y), choose(of_y, last - of_x, of_x)], 2)[:, 0],
    )


def _slide_and_choose(packed: jax.Array, y: jax.Array, x: jax.Array, matrix: jax.Array, limits: Limits) -> jax.Array:
    """The pixels u32[b, h, w] at rows y and columns x; any value where these are outside."""
    (height, width), (h, w) = packed.shape[1:], y.shape[1:]
    angle = math.radians(min(limits.degrees, 45))
    sin, tan = math.sin(angle), math.tan(angle / 2)
    # The nearest pixel and the three slides round by half a pixel each. So far from its place a pixel may come to lie;
    # the last term is what fixed point and float32 add to it.
    inexact = 2**-14 * max(height, width)
    down = int(1 + sin * (1 + tan / 2) + inexact)
    right = int(1.5 + tan / 2 + tan * down + inexact)
    # How far to the left or the right of the image a pixel lies after the first slide that the next two bring into it.
    margin = 3 + math.ceil(tan * h / 2 if limits.degrees > 45 else sin * tan * w / (4 - 2 * sin * tan))
    off_centre = max(height, width) - min(h, w) if limits.degrees > 45 else 0
    tilted = math.ceil(tan * (height / 2 + 2)) + 2 if limits.degrees else 0
    bounds = (
        min(max(math.ceil(limits.shear * height), math.ceil(limits.x), tilted + off_centre), width + 2 * margin),
        min(max(math.ceil(limits.shear * width), math.ceil(limits.y), math.ceil(sin * (width / 2 + margin)) + 2
                + off_centre), height + 2),
        tilted,
    )  # fmt: skip
    slides = _slides(matrix, h, bounds)
    moved = slides.apply(0, packed, 0, -margin, w + margin)
    moved = slides.apply(1, moved, -margin, -down, h + down)
    moved = slides.apply(2, moved, -down, margin - right, margin + w + right)

    c1 = x - slides.amount(0, y)
    r1 = y - slides.amount(1, c1)
    dy = r1 - jnp.arange(h, dtype=jnp.int32)[:, None]
    dx = c1 - slides.amount(2, r1) - jnp.arange(w, dtype=jnp.int32)
    out = moved[:, down : down + h, right : right + w]
    for i in range(2 * down + 1):
        for j in range(2 * right + 1):
            out = jnp.where((dy == i - down) & (dx == j - right), moved[:, i : i + h, j : j + w], out)
    return out


def _slides(matrix: jax.Array, h: int, bounds: tuple[int, int, int]) -> Slides:
    """The three slides that come nearest to the map, for results of h rows."""
    a, b, c, d, _, f = (matrix[:, i] for i in range(6))
    rotates = (b != 0) & (d != 0)
    half = jnp.where(rotates, -d / (1 + a), 0)  # the tangent of half the angle, with its sign
    third = -half * ((h - 1) / 2)  # the middle row stays
    first = jnp.where(rotates, half, b)
    slopes, starts = (first, d, half), (c - third - first * f, f - d * third, third)
    whole = [tuple(jnp.round(v * _ONE).astype(jnp.int32) for v in vs) for vs in (slopes, starts)]
    return Slides(whole[0], tuple(v + _ONE // 2 for v in whole[1]), bounds)

"""Affine maps of images without a gather, for TPU: three slides of whole lines, then a selection among neighbors.

A TPU gathers single pixels slowly, but slides whole lines and selects fast. A rotation is three shears (Paeth 1986, "A
fast algorithm for general raster rotation"): of rows, of columns, and of rows again. Each slides by whole pixels, so
that no pixel is lost, and each pixel ends near its target. The exact map (`geometry`) tells which input pixel to read,
the integer slides where that pixel is now, so the result equals a gather's bit for bit.

A shear or a translation is one slide. A rotation by more than 45 degrees is a turn by 90 degrees, which moves whole
pixels too, and three slides.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from imgclf_jax.augment.tpu_slides import slide

_ONE = 65536  # slides are in 16.16 fixed point, so fusion cannot change their rounding


@dataclass(frozen=True)
class Limits:
    """Bounds on the maps of a policy. A map is a shear, a translation, or a rotation about the centre."""

    shear: float  # pixels sideways per pixel
    x: float  # pixels
    y: float
    degrees: float  # of rotation; 135 at most


@dataclass(frozen=True)
class Slides:
    """Three slides in sequence: of rows, of columns, of rows.

    They move the pixel at row r and column c to column c1 = c - amount(0, r), then to row r1 = r - amount(1, c1), then
    to column c1 - amount(2, r1).
    """

    slopes: tuple[jax.Array, ...]  # three i32[b], in units of 1 / _ONE
    starts: tuple[jax.Array, ...]
    bounds: tuple[int, int, int]

    def amount(self, i: int, line: jax.Array) -> jax.Array:
        """The pixels by which slide i moves these lines, i32[b or 1, …]: i32[b, …], -bound to bound."""
        slope, start = (v.reshape(-1, *[1] * (line.ndim - 1)) for v in (self.slopes[i], self.starts[i]))
        return jnp.clip((slope * line + start) >> 16, -self.bounds[i], self.bounds[i])

    def apply(self, i: int, images: jax.Array, first: int, begin: int, end: int) -> jax.Array:
        """Applies slide i to images [b, h, w], whose lines count from `first`; returns positions `begin` to `end`."""
        across, bound = (2, 1, 2)[i], self.bounds[i]
        lines = first + jnp.arange(images.shape[3 - across], dtype=jnp.int32)[None]
        amount = jnp.expand_dims(self.amount(i, lines) + bound, across)
        return slide(images, amount, 2 * bound, across, begin - bound, end - bound)


def read(
    images: jax.Array, y: jax.Array, x: jax.Array, fill: jax.Array, matrix: jax.Array, limits: Limits
) -> jax.Array:
    """Reads each image [b, h, w, c] at rows y and columns x, i32[b, h, w]; `fill` [c] outside the image.

    y and x are the coordinates of `matrix` f32[b, 6] rounded to the nearest integers: x = a i + b j + c and
    y = d i + e j + f at column i and row j.
    """
    _, h, w, c = images.shape
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    packed = _pack(images)
    if limits.degrees > 45:
        packed, y, x, matrix = _turn(packed, y, x, matrix)
    return jnp.where(inside[..., None], _unpack(_slide_and_select(packed, y, x, matrix, limits), c), fill)


def _pack(images: jax.Array) -> jax.Array:
    """Packs uint8[b, h, w, c], with c at most 4, into u32[b, h, w], to move the channels of a pixel together."""
    shifted = [images[..., i].astype(jnp.uint32) << (8 * i) for i in range(images.shape[-1])]
    return sum(shifted[1:], shifted[0])


def _unpack(packed: jax.Array, c: int) -> jax.Array:
    return jnp.stack([(packed >> (8 * i)).astype(jnp.uint8) for i in range(c)], -1)


def _turn(packed: jax.Array, y: jax.Array, x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, ...]:
    """Turns padded square images [b, h, w], y, x and the map by 90 degrees if the map rotates by more than 45."""
    h, w = packed.shape[1:]
    side = max(h, w)
    packed = jnp.pad(packed, ((0, 0), (0, side - h), (0, side - w)))
    a, d = matrix[:, 0], matrix[:, 3]
    quarter = jnp.where(jnp.abs(d) > a, jnp.sign(d), 0)[:, None, None]  # -1, 0 or 1

    def select(none: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
        return jnp.where(quarter == 0, none, jnp.where(quarter == 1, positive, negative))

    across = packed.swapaxes(1, 2)
    x_row, y_row, last = matrix[:, None, :3], matrix[:, None, 3:], jnp.array([0, 0, side - 1], jnp.float32)
    return (
        select(packed, across[:, ::-1], across[:, :, ::-1]),
        select(y, side - 1 - x, x),
        select(x, y, side - 1 - y),
        jnp.concatenate([select(x_row, y_row, last - y_row), select(y_row, last - x_row, x_row)], 2)[:, 0],
    )


def _slide_and_select(packed: jax.Array, y: jax.Array, x: jax.Array, matrix: jax.Array, limits: Limits) -> jax.Array:
    """The pixels u32[b, h, w] at rows y and columns x; arbitrary where these are outside the image."""
    (height, width), (h, w) = packed.shape[1:], y.shape[1:]
    angle = math.radians(min(limits.degrees, 45))
    sin, tan = math.sin(angle), math.tan(angle / 2)
    # Bounds on a pixel's distance from its target: the nearest pixel and three slides round by half a pixel each, and
    # fixed point and float32 add `inexact`.
    inexact = 2**-14 * max(height, width)
    down = int(1 + sin * (1 + tan / 2) + inexact)
    right = int(1.5 + tan / 2 + tan * down + inexact)
    # After the first slide, pixels up to this far outside the image still come back in the next two.
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
    """The three slides nearest to the map, for outputs of h rows."""
    a, b, c, d, _, f = (matrix[:, i] for i in range(6))
    rotates = (b != 0) & (d != 0)
    half = jnp.where(rotates, -d / (1 + a), 0)  # the tangent of half the angle, with its sign
    third = -half * ((h - 1) / 2)  # the middle row stays
    first = jnp.where(rotates, half, b)
    slopes, starts = (first, d, half), (c - third - first * f, f - d * third, third)
    fixed = [tuple(jnp.round(v * _ONE).astype(jnp.int32) for v in vs) for vs in (slopes, starts)]
    return Slides(fixed[0], tuple(start + _ONE // 2 for start in fixed[1]), bounds)

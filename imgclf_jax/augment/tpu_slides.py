"""Slides of whole image lines by computed amounts without a gather, for TPU."""

import jax
import jax.numpy as jnp
from jax import lax


def slide(lines: jax.Array, amount: jax.Array, most: int, axis: int, begin: int, end: int) -> jax.Array:
    """out[i] = lines[begin + i + amount] along the axis, for i from 0 to end - begin; 0 outside the lines.

    `amount`, i32 from 0 to `most`, has the rank of the lines and one element along the axis. Each of its base-4 digits
    selects one of four slices, in sequence.
    """
    bases = [4**i for i in range(16) if 4**i <= most]
    choices = [min(4, most // base + 1) for base in bases]
    reach = sum(base * (n - 1) for base, n in zip(bases, choices, strict=True))  # at least `most`
    length, padding = end - begin + reach, [(0, 0, 0)] * lines.ndim
    padding[axis] = (-begin, begin + length - lines.shape[axis], 0)
    lines = lax.pad(lines, jnp.zeros((), lines.dtype), padding)
    for base, n in zip(reversed(bases), reversed(choices), strict=True):
        digit, length = amount // base % 4, length - base * (n - 1)
        slices = [lax.slice_in_dim(lines, base * i, base * i + length, axis=axis) for i in range(n)]
        lines = slices[0]
        for i in range(1, n):
            lines = jnp.where(digit == i, slices[i], lines)
    return lines


def crop(images: jax.Array, corners: jax.Array, height: int, width: int) -> jax.Array:
    """Crops each image [b, h, w, c] at its top left corner, i32[b, (y, x)] inside the image."""
    _, h, w, _ = images.shape
    y, x = (corners[:, i, None, None, None] for i in range(2))
    rows = slide(images, y, h - height, 1, 0, height)
    return slide(rows, x, w - width, 2, 0, width)

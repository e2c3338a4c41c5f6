"""Changes of brightness and colour with Pillow's arithmetic, on a batch of uint8 images at once.

Images are uint8[b, h, w, c], c being 1 or 3; a `factor` is f32[b], one an image. A function of single pixels takes any
shape [b, …, c], so that `policies` can apply it to the 256 levels instead of the pixels. Tests hold each function to
`PIL.ImageOps` and `PIL.ImageEnhance`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from imgclf_jax.augment import tpu_photometric
from imgclf_jax.core import platform
from imgclf_jax.core.errors import UserError


def check(name: str, images: jax.Array) -> None:
    """Raises UserError if the op of that name cannot take such images: not uint8, or another number of channels."""
    if images.dtype != jnp.uint8:
        raise UserError(f"{name} works on uint8 images, these are {images.dtype}; put it before normalize")
    if images.shape[-1] not in (1, 3, 4):
        raise UserError(f"{name}: the images have {images.shape[-1]} channels; allowed: 1, 3, 4")


def on_colors(op: Callable[..., jax.Array], images: jax.Array, *args: Any) -> jax.Array:
    """`op(images, *args)` on the colours. Alpha, the fourth channel, stays as it is."""
    if images.shape[-1] < 4:
        return op(images, *args)
    return jnp.concatenate([op(images[..., :3], *args), images[..., 3:]], -1)


def broadcast_along_batch(values: jax.Array, like: jax.Array) -> jax.Array:
    """[b] → [b, 1, …] of the rank of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def grey(images: jax.Array) -> jax.Array:
    """ITU-R 601 luma uint8[b, h, w, 1], rounded as Pillow's `convert("L")` does; grey images as they are."""
    if images.shape[-1] == 1:
        return images
    r, g, b = (images[..., i : i + 1].astype(jnp.int32) for i in range(3))
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).astype(jnp.uint8)


def mean_grey(images: jax.Array) -> jax.Array:
    """The mean of the grey image, rounded to the nearest level: uint8[b, 1, 1, 1]. For at most 2,048² pixels."""
    n = images.shape[1] * images.shape[2]
    total = jnp.sum(grey(images), (1, 2, 3), dtype=jnp.int32, keepdims=True)
    return ((2 * total + n) // (2 * n)).astype(jnp.uint8)


def blend(degenerate: jax.Array, images: jax.Array, factor: jax.Array) -> jax.Array:
    """degenerate + factor * (images - degenerate), cut to 0 … 255 and truncated: `Image.blend`.

    The factor 0 gives the degenerate image, 1 gives the image, and above 1 the difference grows.
    """
    low = degenerate.astype(jnp.float32)
    product = rounded_product(broadcast_along_batch(factor, images), images.astype(jnp.float32) - low)
    return jnp.clip(low + product, 0, 255).astype(jnp.uint8)


def rounded_product(factor: jax.Array, whole: jax.Array) -> jax.Array:
    """factor * whole in float32, rounded before anything is added; `whole` holds whole numbers below 2**12.

    A compiler may join a product and a sum to one operation that rounds once. So the factor goes in two parts of 12
    bits. Their products are exact, and the sum of these is the rounded product either way.
    """
    high = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(factor, jnp.int32) & -4096, jnp.float32)
    return high * whole + (factor - high) * whole


def brightness(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with black."""
    return blend(jnp.zeros_like(images), images, factor)


def contrast(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the mean of the grey image."""
    return blend(mean_grey(images), images, factor)


def color(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the grey image (saturation); grey images stay as they are."""
    return blend(grey(images), images, factor)


def smooth(images: jax.Array, cut: bool = False) -> jax.Array:
    """The mean over 3×3 pixels, the middle one counted five times; the border stays: `ImageFilter.SMOOTH`.

    It is rounded to the nearest level, or with `cut` to the one below.
    """
    h, w = images.shape[1:3]
    if h < 3 or w < 3:
        return images
    if platform.current() == "tpu":
        total = tpu_photometric.weighted_sum(images)
    else:
        x = images.astype(jnp.int32)
        rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
        total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * x[:, 1:-1, 1:-1]
    # The quotient is never within 1/26 of a whole number, so that its rounding does not matter.
    inner = ((total.astype(jnp.float32) + (0.5 if cut else 6.5)) / 13).astype(jnp.uint8)
    return images.at[:, 1:-1, 1:-1].set(inner)


def sharpness(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the smoothed image."""
    return blend(smooth(images), images, factor)


def invert(images: jax.Array) -> jax.Array:
    """255 - x."""
    return 255 - images


def posterize(images: jax.Array, bits: jax.Array) -> jax.Array:
    """Keeps the highest `bits` i32[b], 1 to 8, of each value."""
    keep = (256 - (1 << (8 - bits))).astype(jnp.uint8)
    return images & broadcast_along_batch(keep, images)


def solarize(images: jax.Array, threshold: jax.Array) -> jax.Array:
    """Inverts values from `threshold` i32[b] on; 256 inverts none."""
    return jnp.where(images.astype(jnp.int32) < broadcast_along_batch(threshold, images), images, 255 - images)


def extremes(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest value of each channel, uint8[b, 1, 1, c]."""
    return jnp.min(images, (1, 2), keepdims=True), jnp.max(images, (1, 2), keepdims=True)


def stretch(levels: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """floor(255 (x - low) / (high - low)), and x where low = high; cut to 0 … 255."""
    x, low, high = (v.astype(jnp.float32) for v in (levels, low, high))
    # The half keeps a whole quotient from being rounded down, and lifts no other one to the next whole number.
    stretched = jnp.clip((255 * (x - low) + 0.5) / jnp.maximum(high - low, 1), 0, 255).astype(jnp.uint8)
    return jnp.where(high > low, stretched, levels)


def autocontrast(images: jax.Array) -> jax.Array:
    """Stretches each channel to 0 … 255.

    Pillow computes x * scale + offset in float64. Where the exact value is whole, it may come out one level lower.
    """
    return stretch(images, *extremes(images))


def histogram(images: jax.Array) -> jax.Array:
    """How often each value occurs in each channel: i32[b, 256, c].

    `vmap` shows the compiler that images are independent: so those that are split over devices stay on their devices.
    """
    if platform.current() == "tpu":
        return tpu_photometric.histogram(images)
    b, h, w, c = images.shape
    bins = images.astype(jnp.int32) * c + jnp.arange(c, dtype=jnp.int32)

    def count(bins: jax.Array) -> jax.Array:
        return jnp.zeros(256 * c, jnp.int32).at[bins].add(1, mode="promise_in_bounds")

    return jax.vmap(count)(bins.reshape(b, h * w * c)).reshape(b, 256, c)


def equalization(images: jax.Array) -> jax.Array:
    """The table uint8[b, 256, c] that makes each channel's histogram as flat as possible: `ImageOps.equalize`."""
    counts = histogram(images)
    n = images.shape[1] * images.shape[2]
    below = jnp.cumsum(counts, 1) - counts
    _, high = extremes(images)
    last = jnp.take_along_axis(counts, high[:, 0].astype(jnp.int32), 1)  # [b, 1, c]
    step = (n - last) // 255
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table, jnp.arange(256, dtype=jnp.int32)[:, None]).astype(jnp.uint8)


def lookup(images: jax.Array, table: jax.Array) -> jax.Array:
    """Each value replaced by its entry in its image's and channel's table, uint8[b, 256, c]."""
    if platform.current() == "tpu":
        return tpu_photometric.lookup(images, table)
    b, h, w, c = images.shape
    values = images.reshape(b, h * w, c).astype(jnp.int32)
    return jnp.take_along_axis(table, values, 1, mode="promise_in_bounds").reshape(images.shape)


def equalize(images: jax.Array) -> jax.Array:
    """Makes the histogram of each channel as flat as possible."""
    return lookup(images, equalization(images))


def hue(images: jax.Array, shift: jax.Array) -> jax.Array:
    """Turns the hue by `shift` f32[b] (1 is a whole turn), in HSV as `colorsys` defines it; grey images stay.

    In floating point, rounded once at the end. Pillow's own HSV has 8 bits, and changes colours even by a shift of 0.
    """
    if images.shape[-1] == 1:
        return images
    x = images.astype(jnp.float32)
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    high, low = jnp.max(x, -1), jnp.min(x, -1)
    span = high - low
    scale = jnp.where(span > 0, 1 / jnp.maximum(span, 1), 0)
    sixths = jnp.where(high == r, (g - b) * scale, jnp.where(high == g, 2 + (b - r) * scale, 4 + (r - g) * scale))
    turned = sixths[..., None] + 6 * broadcast_along_batch(shift, images)
    # Channel n of HSV → RGB: value - span * max(0, min(k, 4 - k, 1)), k = (n + sixths) mod 6, n = 5, 3, 1.
    k = turned + jnp.array([5.0, 3.0, 1.0], jnp.float32)
    k -= 6 * jnp.floor(k / 6)
    out = high[..., None] - span[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)
    return jnp.round(out).astype(jnp.uint8)

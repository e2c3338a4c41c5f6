"""Batched changes of brightness and color with Pillow's arithmetic.

Images are uint8[b, h, w, c] with c = 1 or 3; a `factor` is f32[b], one per image. Pointwise functions take any shape
[b, …, c], so `policies` can apply them to the 256 levels instead of the pixels.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core import platform
from imgclf_jax.core.errors import UserError

Fill = float | tuple[float, ...]


def check(name: str, images: jax.Array) -> None:
    """Raises UserError unless images are uint8 with 1 or 3 channels; `name` is the op."""
    if images.dtype != jnp.uint8:
        raise UserError(f"{name} needs uint8 images, but these are {images.dtype}; put it before normalize")
    if images.shape[-1] not in (1, 3):
        raise UserError(f"{name}: the images have {images.shape[-1]} channels; allowed are 1 and 3")


def fill_values(name: str, images: jax.Array, fill: Fill | str) -> jax.Array:
    """`fill`, one value or one per channel, in the dtype of the images; `name` is the op in the error."""
    is_wrong = images.dtype == jnp.uint8 and not all(v in range(256) for v in np.ravel(fill))
    if is_wrong or np.size(fill) not in (1, images.shape[-1]):
        raise UserError(f"{name}(fill={fill!r}): one value or one per channel; of uint8 images whole, from 0 to 255")
    return jnp.broadcast_to(jnp.asarray(fill, images.dtype), images.shape[-1:])


def broadcast_along_batch(values: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes [b] to [b, 1, …] of the rank of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def grey(images: jax.Array, tensorflow: bool = False) -> jax.Array:
    """ITU-R 601 luma uint8[b, h, w, 1], rounded like Pillow's `convert("L")`. Grey images pass unchanged.

    `tensorflow` makes it `tf.image.rgb_to_grayscale`: (0.2989 r + 0.587 g + 0.114 b) * 255.5 / 255, rounded down.
    """
    if images.shape[-1] == 1:
        return images
    r, g, b = (images[..., i : i + 1].astype(jnp.int32) for i in range(3))
    if tensorflow:
        return ((2989 * r + 5870 * g + 1140 * b) * 511 // 5_100_000).astype(jnp.uint8)
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).astype(jnp.uint8)


def mean_grey(images: jax.Array) -> jax.Array:
    """The mean of the grey image, rounded to the nearest level: uint8[b, 1, 1, 1]. Exact for up to 2**23 pixels."""
    n = images.shape[1] * images.shape[2]
    total = jnp.sum(grey(images), (1, 2, 3), dtype=jnp.int32, keepdims=True)
    return ((total + n // 2) // n).astype(jnp.uint8)


def blend(degenerate: jax.Array, images: jax.Array, factor: jax.Array) -> jax.Array:
    """degenerate + factor * (images - degenerate), clipped to 0 … 255 and truncated, as in `Image.blend`.

    A factor of 0 is the degenerate image, 1 the image, and more than 1 extrapolates.
    """
    low = degenerate.astype(jnp.float32)
    product = rounded_product(broadcast_along_batch(factor, images), images.astype(jnp.float32) - low)
    return jnp.clip(low + product, 0, 255).astype(jnp.uint8)


def rounded_product(factor: jax.Array, integers: jax.Array) -> jax.Array:
    """factor * integers in float32, rounded before any addition, even by an FMA; the integers are below 2**12.

    Splitting the factor into two parts of 12 bits makes both products exact, so their sum is the rounded product.
    """
    high = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(factor, jnp.int32) & -4096, jnp.float32)
    return high * integers + (factor - high) * integers


def brightness(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with black."""
    return blend(jnp.zeros_like(images), images, factor)


def contrast(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the mean level of the grey image."""
    return blend(mean_grey(images), images, factor)


def color(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the grey image (saturation). Grey images do not change."""
    return blend(grey(images), images, factor)


def smooth(images: jax.Array, tensorflow: bool = False) -> jax.Array:
    """The mean over 3×3 pixels with the centre weighted five times, except on the border: `ImageFilter.SMOOTH`.

    It rounds to the nearest level, or for `tensorflow` down.
    """
    h, w = images.shape[1:3]
    if h < 3 or w < 3:
        return images
    x = images.astype(jnp.int32)
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * x[:, 1:-1, 1:-1]
    # The quotient is never within 1/26 of an integer, so its rounding does not matter.
    inner = ((total.astype(jnp.float32) + (0.5 if tensorflow else 6.5)) / 13).astype(jnp.uint8)
    return images.at[:, 1:-1, 1:-1].set(inner)


def posterize(images: jax.Array, bits: jax.Array) -> jax.Array:
    """Keeps the highest `bits` i32[b], 1 to 8, of each value."""
    keep = (256 - (1 << (8 - bits))).astype(jnp.uint8)
    return images & broadcast_along_batch(keep, images)


def solarize(images: jax.Array, threshold: jax.Array) -> jax.Array:
    """Inverts values of `threshold` i32[b] or more; 256 inverts none."""
    return jnp.where(images.astype(jnp.int32) < broadcast_along_batch(threshold, images), images, 255 - images)


def extremes(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and greatest values of each channel, uint8[b, 1, 1, c]."""
    return jnp.min(images, (1, 2), keepdims=True), jnp.max(images, (1, 2), keepdims=True)


def stretch(levels: jax.Array, low: jax.Array, high: jax.Array, tensorflow: bool = False) -> jax.Array:
    """floor(255 (x - low) / (high - low)), clipped to 0 … 255; x if low = high: autocontrast.

    Pillow computes x * scale + offset in float64, and may be one level lower where the exact value is an integer.
    `tensorflow` has big_vision's rounding: x * scale - low * scale in float32.
    """
    x, low, high = (v.astype(jnp.float32) for v in (levels, low, high))
    span = jnp.maximum(high - low, 1)
    if tensorflow:
        stretched = rounded_product(255 / span, x) - rounded_product(255 / span, low)
    else:  # the half keeps an integer quotient from rounding down, and lifts no other to the next integer
        stretched = (255 * (x - low) + 0.5) / span
    return jnp.where(high > low, jnp.clip(stretched, 0, 255).astype(jnp.uint8), levels)


def histogram(images: jax.Array) -> jax.Array:
    """The histogram of each channel, i32[b, 256, c], exact for up to 2**24 pixels."""
    b, h, w, c = images.shape
    if platform.current() == "tpu":  # scatters are slow: a matmul counts pairs of the upper and lower four bits
        digits, pixels = jnp.arange(16, dtype=jnp.uint8), images.reshape(b, h * w, c, 1)
        upper, lower = ((half == digits).astype(jnp.bfloat16) for half in (pixels >> 4, pixels % 16))
        counts = jnp.einsum("bnci,bncj->bijc", upper, lower, preferred_element_type=jnp.float32)
        return counts.reshape(b, 256, c).astype(jnp.int32)
    bins = images.astype(jnp.int32) * c + jnp.arange(c, dtype=jnp.int32)
    # `vmap` shows the compiler that images are independent, so each device keeps its own.
    count = jax.vmap(lambda own: jnp.zeros(256 * c, jnp.int32).at[own].add(1, mode="promise_in_bounds"))
    return count(bins.reshape(b, h * w * c)).reshape(b, 256, c)


def equalization(images: jax.Array) -> jax.Array:
    """The lookup table uint8[b, 256, c] that equalizes each channel's histogram, as in `ImageOps.equalize`."""
    counts = histogram(images)
    n = images.shape[1] * images.shape[2]
    below = jnp.cumsum(counts, 1) - counts
    _, high = extremes(images)
    last = jnp.take_along_axis(counts, high[:, 0].astype(jnp.int32), 1)  # [b, 1, c]
    step = (n - last) // 255
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table, jnp.arange(256, dtype=jnp.int32)[:, None]).astype(jnp.uint8)


def lookup(images: jax.Array, table: jax.Array) -> jax.Array:
    """Replaces each value by its entry in its image's and channel's table, uint8[b, 256, c]."""
    b, h, w, c = images.shape
    if platform.current() == "tpu":  # gathers are slow: a binary selection among 64 words of four levels
        fours = table.reshape(b, 64, 4, c).astype(jnp.uint32)
        words = fours[:, :, 0] | fours[:, :, 1] << 8 | fours[:, :, 2] << 16 | fours[:, :, 3] << 24  # u32[b, 64, c]
        levels = images.astype(jnp.uint32)
        candidates = [words[:, i, None, None] for i in range(64)]
        for bit in range(2, 8):
            pairs = zip(candidates[1::2], candidates[::2], strict=True)
            candidates = [jnp.where(levels >> bit & 1 == 1, *pair) for pair in pairs]
        return (candidates[0] >> (levels % 4 * 8)).astype(jnp.uint8)
    values = images.reshape(b, h * w, c).astype(jnp.int32)
    return jnp.take_along_axis(table, values, 1, mode="promise_in_bounds").reshape(images.shape)


def apply_ops(
    images: jax.Array, op: jax.Array, names: Sequence[str], tables: Mapping[str, jax.Array], factor: jax.Array,
    tensorflow: bool = False,
) -> jax.Array:  # fmt: skip
    """Applies to each image its own op, an index i32[b] into `names`; ops without a change of color do nothing.

    "color" blends with `grey(images)`, "sharpness" with `smooth(images)`, by `factor` f32[b]; the others are lookup
    `tables` uint8[b or 1, 256, 1, 1 or c].
    """
    b, _, _, c = images.shape
    is_op = {name: (op == i)[:, None, None, None] for i, name in enumerate(names)}
    table = jnp.broadcast_to(jnp.arange(256, dtype=jnp.uint8)[:, None, None], (b, 256, 1, c))
    for name, other in tables.items():
        table = jnp.where(is_op[name], other, table)
    # On CPU, the barriers keep fusion from recomputing the table, grey and smooth images for each pixel.
    images = lookup(images, platform.cpu_barrier(table)[:, :, 0])
    greyed, smoothed = platform.cpu_barrier((grey(images, tensorflow), smooth(images, tensorflow)))
    blended = blend(jnp.where(is_op["color"], greyed, smoothed), images, factor)
    return jnp.where(is_op["color"] | is_op["sharpness"], blended, images)


def hue(images: jax.Array, shift: jax.Array) -> jax.Array:
    """Shifts the hue by `shift` f32[b] of a full turn, in the HSV of `colorsys`. Grey images do not change.

    It computes in float32 and rounds once, whereas Pillow's 8-bit HSV changes colors even for a shift of 0.
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

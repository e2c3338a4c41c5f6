"""The computation of each common corruption (see `corruptions`), in three kinds of functions.

- `NAME_tables(constant, h, w, constants)` computes arrays from a published constant, the image size, and the constants
  of all severities.
- `NAME_draw(key, image, tables)` draws the random values for one example.
- `NAME(images, tables, draws)` corrupts uint8[b, h, w, c].
"""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from scipy import stats

from imgclf_jax.core import rng
from imgclf_jax.core.typing import PyTree
from imgclf_jax.tools.evaluate import fields
from imgclf_jax.tools.evaluate.fields import Constant, Constants, Tables
from imgclf_jax.tools.evaluate.jpeg import quantization_tables


def to_unit(images: jax.Array) -> jax.Array:
    """Scales uint8 levels to f32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def to_uint8(values: jax.Array) -> jax.Array:
    """Converts f32 in [0, 1] to uint8 by truncation, as published, with a tolerance of 1e-4 levels."""
    return jnp.floor(jnp.clip(values, 0, 1) * 255 + 1e-4).astype(jnp.uint8)


def _round(values: jax.Array) -> jax.Array:
    """Rounds f32 levels to integers in [0, 255], still f32."""
    return jnp.floor(jnp.clip(values, 0, 255) + 0.5)


def scalar(constant: float, h: int, w: int, constants: Constants) -> Tables:
    """Returns a scalar constant as `c`."""
    return {"c": np.float32(constant)}


def shot_tables(constant: float, h: int, w: int, constants: Constants) -> Tables:
    """Returns `cdf` f32[256, n], for each level the Poisson CDF at 0, 1, … photons, and `c`, the mean for white.

    n + 1 is a power of two, at least 8 standard deviations above the largest mean.
    """
    most = max(constants)
    n = (1 << int(most + 8 * most**0.5).bit_length()) - 1
    cdf = stats.poisson.cdf(np.arange(n), np.arange(256)[:, None] / 255 * constant)
    return {"c": np.float32(constant), "cdf": cdf.astype(np.float32)}


def shot(images: jax.Array, tables: Tables, draws: jax.Array) -> jax.Array:
    """Replaces each value by a Poisson photon count: inverse transform sampling, with a binary search of the CDF."""
    n = tables["cdf"].shape[1]
    first = images.astype(jnp.int32) * n
    count = jnp.zeros(images.shape, jnp.int32)
    for step in ((n + 1) >> k for k in range(1, n.bit_length() + 1)):
        smaller = tables["cdf"].reshape(-1)[first + count + step - 1] < draws
        count = jnp.where(smaller, count + step, count)
    return to_uint8(count.astype(jnp.float32) / tables["c"])


def impulse_draw(key: jax.Array, image: jax.Array, tables: Tables) -> tuple[jax.Array, jax.Array]:
    """Draws which values are hit and which of these become white: two f32[h, w, c] in [0, 1)."""
    return jax.random.uniform(rng.fold(key, "hit"), image.shape), jax.random.uniform(rng.fold(key, "salt"), image.shape)


def impulse(images: jax.Array, tables: Tables, draws: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Sets the fraction `c` of the values to white or black."""
    hit, salt = draws
    return jnp.where(hit <= tables["c"], jnp.where(salt <= 0.5, jnp.uint8(255), jnp.uint8(0)), images)


def defocus_tables(constant: Constant, h: int, w: int, constants: Constants) -> Tables:
    """Returns the disk `kernel`, cropped to the largest nonzero extent of all severities."""
    kernels = [fields.disk_kernel(*each) for each in constants]
    reach = max(int(np.abs(np.argwhere(k > 1e-12) - k.shape[0] // 2).max()) for k in kernels)
    kernel = kernels[constants.index(constant)]
    kernel = np.pad(kernel, max(0, reach - kernel.shape[0] // 2))
    center = kernel.shape[0] // 2
    crop = slice(center - reach, center + reach + 1)
    return {"kernel": kernel[crop, crop].astype(np.float32)}


def glass_tables(constant: Constant, h: int, w: int, constants: Constants) -> Tables:
    """Returns the blur matrices of `rows` and `columns`, the `reach` of a copy, and which rounds are `active`."""
    sigma, reach, rounds = constant
    rows, columns = (fields.gaussian_matrix(n, sigma, "nearest", 4) for n in (h, w))
    active = np.arange(max(each[2] for each in constants)) < rounds
    return {"rows": rows, "columns": columns, "reach": np.int32(reach), "active": active}


def glass_draw(key: jax.Array, image: jax.Array, tables: Tables) -> jax.Array:
    """Draws offsets (y, x) in [-reach, reach), i32[rounds, 2, h, w]."""
    shape = (tables["active"].shape[0], 2, *image.shape[:2])
    return jax.random.randint(key, shape, -tables["reach"], tables["reach"], jnp.int32)


def glass(images: jax.Array, tables: Tables, offsets: jax.Array) -> jax.Array:
    """Blurs, copies each pixel from its neighborhood in each round, and blurs again."""
    b, h, w, c = images.shape

    def blur(values: jax.Array) -> jax.Array:
        return to_uint8(fields.apply_separable(tables["rows"], tables["columns"], to_unit(values)))

    flat = blur(images).reshape(b, h * w, c)
    for i in range(offsets.shape[1]):
        sources = fields.trace_copies(offsets[:, i, 0], offsets[:, i, 1], tables["reach"])
        flat = jnp.where(tables["active"][i], jnp.take_along_axis(flat, sources[..., None], 1), flat)
    return blur(flat.reshape(images.shape))


def motion_tables(constant: Constant, h: int, w: int, constants: Constants) -> Tables:
    """Returns the weights for `fields.motion_blur`."""
    return fields.motion_tables(constant[0], constant[1], 2 * max(each[0] for each in constants) + 1)


def motion(images: jax.Array, tables: Tables, degrees: jax.Array) -> jax.Array:
    """Blurs along a line at an angle f32[b], and rounds as ImageMagick does."""
    return _round(fields.motion_blur(images.astype(jnp.float32), tables, degrees)).astype(jnp.uint8)


def zoom_tables(constant: Constant, h: int, w: int, constants: Constants) -> Tables:
    """Returns the sampling tables of the enlargements; a constant is the (start, stop, step) of their factors."""
    return fields.zoom_tables(np.arange(*constant), h, w, max(len(np.arange(*each)) for each in constants))


def zoom(images: jax.Array, tables: Tables, draws: PyTree) -> jax.Array:
    """Averages the image and its enlargements."""
    images, count = to_unit(images), tables["count"]
    total = jax.lax.fori_loop(0, count, lambda i, out: out + fields.enlarge(images, tables, i), images)
    return to_uint8(total / (count + 1).astype(jnp.float32))


def snow_tables(constant: Constant, h: int, w: int, constants: Constants) -> Tables:
    """Returns the scalars by name, the sampling tables that enlarge the flakes, and the weights of their `motion`."""
    mean, std, zoom, threshold, radius, sigma, kept = constant
    scalars = {"mean": mean, "std": std, "threshold": threshold, "kept": kept}
    return {
        **{name: np.float32(value) for name, value in scalars.items()},
        **fields.zoom_tables(np.array([zoom]), h, w, 1),
        "motion": fields.motion_tables(radius, sigma, 2 * max(each[4] for each in constants) + 1),
    }


def snow_draw(key: jax.Array, image: jax.Array, tables: Tables) -> tuple[jax.Array, jax.Array]:
    """Draws the flakes f32[h, w] before enlargement, and their angle of fall in degrees."""
    angle = jax.random.uniform(rng.fold(key, "angle"), minval=-135, maxval=-45)
    return jax.random.normal(rng.fold(key, "flakes"), image.shape[:2]), angle


def snow(images: jax.Array, tables: Tables, draws: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Whitens the image, and adds falling flakes and the same flakes rotated by 180 degrees."""
    flakes, degrees = draws
    layer = fields.enlarge(tables["mean"] + tables["std"] * flakes[..., None], tables, 0)  # [b, h, w, 1]
    layer = to_uint8(jnp.where(layer < tables["threshold"], 0.0, layer)).astype(jnp.float32)
    layer = _round(fields.motion_blur(layer, tables["motion"], degrees)) / 255
    images, kept = to_unit(images), tables["kept"]
    weights = jnp.array([0.299, 0.587, 0.114], jnp.float32)
    luma = (images * weights).sum(-1, keepdims=True) if images.shape[-1] == 3 else images
    images = kept * images + (1 - kept) * jnp.maximum(images, luma * 1.5 + 0.5)
    return to_uint8(images + layer + layer[:, ::-1, ::-1])


def fog_tables(constant: Constant, h: int, w: int, constants: Constants) -> Tables:
    """Returns the `amount` of fog, and the `decay` of its amplitude from coarse to fine."""
    return {"amount": np.float32(constant[0]), "decay": np.float32(constant[1])}


def fog_draw(key: jax.Array, image: jax.Array, tables: Tables) -> jax.Array:
    """Draws the noise for `fields.plasma`, f32[n, n], with n the smallest power of two that covers the image."""
    side = 1 << (max(image.shape[:2]) - 1).bit_length()
    return jax.random.uniform(key, (side, side), minval=-1, maxval=1)


def fog(images: jax.Array, tables: Tables, draws: jax.Array) -> jax.Array:
    """Adds plasma to the image, and rescales it to the maximum of the image."""
    h, w = images.shape[1:3]
    amount, images = tables["amount"], to_unit(images)
    most = images.max((1, 2, 3), keepdims=True)
    fog = fields.plasma(draws, tables["decay"])[:, :h, :w, None]
    return to_uint8((images + amount * fog) * most / (most + amount))


def brightness(images: jax.Array, tables: Tables, draws: PyTree) -> jax.Array:
    """Adds `c` to the HSV value, to which the channels are proportional at fixed hue and saturation."""
    images = to_unit(images)
    value = images.max(-1, keepdims=True)
    brighter = jnp.minimum(value + tables["c"], 1)
    return to_uint8(jnp.where(value > 0, images * (brighter / jnp.where(value > 0, value, 1)), brighter))


def contrast(images: jax.Array, tables: Tables, draws: PyTree) -> jax.Array:
    """Multiplies the difference from each channel's mean by `c`."""
    images = to_unit(images)
    mean = images.mean((1, 2), keepdims=True)
    return to_uint8((images - mean) * tables["c"] + mean)


def elastic_tables(constant: Constant, h: int, w: int, constants: Constants) -> Tables:
    """Returns the blur matrices of `rows` and `columns`, the displacement `strength`, and the `affine` reach."""
    side = min(h, w)
    strength, sigma, affine = (side * fraction for fraction in constant)
    rows, columns = (fields.gaussian_matrix(n, sigma, "reflect", 3) for n in (h, w))
    return {"rows": rows, "columns": columns, "strength": np.float32(strength), "affine": np.float32(affine)}


def elastic_draw(key: jax.Array, image: jax.Array, tables: Tables) -> tuple[jax.Array, jax.Array]:
    """Draws the shifts (x, y) of three points, [3, 2], and of each pixel, [h, w, 2], all in [-1, 1)."""
    points = jax.random.uniform(rng.fold(key, "points"), (3, 2), minval=-1, maxval=1)
    return points, jax.random.uniform(rng.fold(key, "ways"), (*image.shape[:2], 2), minval=-1, maxval=1)


def elastic(images: jax.Array, tables: Tables, draws: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies an affine map that moves three points, then a smooth displacement field."""
    points, shifts = draws
    h, w = images.shape[1:3]
    # Moving the points center + s (1, 1), s (1, -1) and s (-1, -1) defines an affine map about the center.
    s = min(h, w) // 3
    moves = tables["affine"] * points  # [b, 3, 2]
    first, second, third = moves[:, 0], moves[:, 1], moves[:, 2]
    linear = jnp.eye(2) + jnp.stack([second - third, first - second], -1) / (2 * s)  # [b, 2, 2]
    shift = (first + third) / 2
    y, x = jnp.meshgrid(jnp.arange(h, dtype=jnp.float32), jnp.arange(w, dtype=jnp.float32), indexing="ij")
    to_x, to_y = (grid - size // 2 - shift[:, i, None, None] for i, (grid, size) in enumerate(((x, w), (y, h))))
    a, b, c, d = (linear[:, i, j, None, None] for i in (0, 1) for j in (0, 1))
    determinant = a * d - b * c
    from_x, from_y = (d * to_x - b * to_y) / determinant, (a * to_y - c * to_x) / determinant
    moved = fields.sample_bilinear(to_unit(images), from_y + h // 2, from_x + w // 2, repeat_border=False)
    shifts = tables["strength"] * fields.apply_separable(tables["rows"], tables["columns"], shifts)  # [b, h, w, 2]
    return to_uint8(fields.sample_bilinear(moved, y + shifts[..., 1], x + shifts[..., 0], repeat_border=True))


def _box_matrix(n: int, m: int) -> np.ndarray:
    """Returns f32[m, n], which resizes n pixels to m as Pillow's BOX filter."""
    return np.asarray(Image.fromarray(np.eye(n, dtype=np.float32)).resize((n, m), Image.Resampling.BOX))


def pixelate_tables(constant: float, h: int, w: int, constants: Constants) -> Tables:
    """Returns matrices [n, n] that shrink and enlarge in one step; enlarging copies pixels, so it never rounds."""
    out = {}
    for axis, n in (("rows", h), ("columns", w)):
        small = max(1, int(n * constant))
        out[axis] = _box_matrix(small, n) @ _box_matrix(n, small)
    return out


def pixelate(images: jax.Array, tables: Tables, draws: PyTree) -> jax.Array:
    """Shrinks with Pillow's BOX filter, and enlarges to the original size."""
    exact = jax.lax.Precision.HIGHEST
    wide = jnp.einsum("nw,bhwc->bhnc", tables["columns"], images.astype(jnp.float32), precision=exact)
    # Pillow rounds after resizing the width; 1e-4 rounds halves up in spite of float32 errors.
    wide = jnp.floor(wide + 0.5 + 1e-4)
    out = jnp.einsum("mh,bhwc->bmwc", tables["rows"], wide, precision=exact)
    return jnp.floor(out + 0.5 + 1e-4).astype(jnp.uint8)


def jpeg_tables(constant: int, h: int, w: int, constants: Constants) -> Tables:
    """Returns the `quantization` tables for a quality."""
    return {"quantization": quantization_tables(constant)}

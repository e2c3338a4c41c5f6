"""Batched blurs, warps and random fields in float32, the building blocks of the corruptions.

Images are f32[b, h, w, c]. NumPy precomputes in float64 whatever depends only on the severity: matrices, kernels,
indices and weights. So one compiled program serves all severities.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.ndimage import map_coordinates
from scipy import ndimage

from imgclf_jax.core.typing import Array

_EXACT = lax.Precision.HIGHEST

type Constant = Any  # of one severity: a number, or a tuple of them
type Constants = tuple[Constant, ...]  # of all severities
type Tables = dict[str, Array]  # arrays by name


def gaussian_matrix(n: int, sigma: float, mode: str, truncate: float) -> np.ndarray:
    """Returns SciPy's Gaussian filter of n values as a matrix f32[n, n], with its truncation and border `mode`."""
    if sigma == 0:
        return np.eye(n, dtype=np.float32)
    return ndimage.gaussian_filter1d(np.eye(n), sigma, axis=0, mode=mode, truncate=truncate).astype(np.float32)


def apply_separable(rows: jax.Array, columns: jax.Array, images: jax.Array) -> jax.Array:
    """Applies a matrix [m, h] along the height and one [n, w] along the width of [b, h, w, c], to [b, m, n, c]."""
    images = jnp.einsum("mh,bhwc->bmwc", rows, images, precision=_EXACT)
    return jnp.einsum("nw,bmwc->bmnc", columns, images, precision=_EXACT)


def disk_kernel(radius: float, alias_blur: float) -> np.ndarray:
    """Returns a normalized, anti-aliased disk f64[k, k], with k at least 17."""
    reach, size = (8, 3) if radius <= 8 else (int(radius), 5)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float64)
    return ndimage.gaussian_filter(disk / disk.sum(), alias_blur, mode="mirror", radius=size // 2)


def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Correlates each channel with a kernel [k, k], k odd, with NumPy's "reflect" padding."""
    b, h, w, c = images.shape
    reach = kernel.shape[0] // 2
    rows, columns = (np.pad(np.arange(n), reach, "reflect") for n in (h, w))
    planes = images[:, rows][:, :, columns].transpose(0, 3, 1, 2).reshape(b * c, 1, h + 2 * reach, w + 2 * reach)
    out = lax.conv_general_dilated(planes, kernel[None, None], (1, 1), "VALID", precision=_EXACT)
    return out.reshape(b, c, h, w).transpose(0, 2, 3, 1)


def motion_tables(radius: float, sigma: float, longest: int) -> Tables:
    """Returns ImageMagick's one-sided Gaussian `weights` f32[longest] of motion blur, zero after the first `count`."""
    count = 2 * int(np.ceil(radius)) + 1
    weights = np.exp(-(np.arange(count) ** 2) / (2 * sigma**2))
    weights = np.pad(weights / weights.sum(), (0, longest - count))
    return {"weights": weights.astype(np.float32), "count": np.int32(count)}


def motion_blur(images: jax.Array, tables: Tables, degrees: jax.Array) -> jax.Array:
    """Averages each image along a line from each pixel, at the image's angle f32[b] from the x to the y axis.

    Tap i reads the pixel nearest to i times the direction. The border pixels extend outward.
    """
    weights = tables["weights"]
    reach, (h, w) = weights.shape[0] - 1, images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), "edge")
    direction = jnp.stack([jnp.sin(jnp.deg2rad(degrees)), jnp.cos(jnp.deg2rad(degrees))], -1)  # [b, 2]

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        starts = reach + jnp.ceil(i.astype(jnp.float32) * direction - 0.5).astype(jnp.int32)
        shift = jax.vmap(lambda image, start: lax.dynamic_slice(image, (*start, 0), (h, w, image.shape[-1])))
        return total + weights[i] * shift(padded, starts)

    return lax.fori_loop(0, tables["count"], add, jnp.zeros_like(images))


def zoom_tables(factors: np.ndarray, h: int, w: int, most: int) -> Tables:
    """Returns indices and weights of linear interpolation for each factor, zero after the first `count` of `most`.

    An enlargement takes the middle ceil(n / factor) pixels of each side, stretches them to round(factor * that) pixels
    with aligned corners, and crops the middle n.
    """
    out: Tables = {"count": np.int32(len(factors))}
    for axis, n in (("rows", h), ("columns", w)):
        low, weight = np.zeros((most, n), np.int32), np.zeros((most, n), np.float32)
        for i, factor in enumerate(factors):
            kept = int(np.ceil(n / factor))
            size = round(kept * factor)
            coordinate = ((size - n) // 2 + np.arange(n)) * (kept - 1) / max(size - 1, 1)
            low[i] = np.minimum(coordinate, max(kept - 2, 0)).astype(np.int32)
            weight[i] = coordinate - low[i]
            low[i] += (n - kept) // 2
        out[axis], out[f"{axis}_weight"] = low, weight
    return out


def enlarge(images: jax.Array, tables: Tables, i: jax.Array | int) -> jax.Array:
    """Enlarges images by factor i of `zoom_tables`, with linear interpolation."""
    for axis, name in ((1, "rows"), (2, "columns")):
        low, weight = tables[name][i], jnp.expand_dims(tables[f"{name}_weight"][i], tuple(range(1, 4 - axis)))
        high = jnp.minimum(low + 1, images.shape[axis] - 1)
        images = jnp.take(images, low, axis) * (1 - weight) + jnp.take(images, high, axis) * weight
    return images


def plasma(draws: jax.Array, decay: jax.Array) -> jax.Array:
    """Returns a diamond-square fractal f32[b, n, n] on a torus, in [0, 1], from draws [b, n, n] in [-1, 1].

    n is a power of two. Pixel (0, 0) starts at 0. Each round sets the centers of the squares, and then of their sides,
    to the mean of their four neighbors plus the pixel's draw times w². w starts at 100 and is divided by `decay` after
    each round.
    """
    b, n, _ = draws.shape
    field, w = jnp.zeros((b, 1, 1), jnp.float32), jnp.float32(100)
    for step in (n >> k for k in range(n.bit_length() - 1)):
        half = step // 2
        down, right = jnp.roll(field, -1, 1), jnp.roll(field, -1, 2)
        middle = (field + down + right + jnp.roll(down, -1, 2)) / 4 + w * w * draws[:, half::step, half::step]
        above = (field + right + middle + jnp.roll(middle, 1, 1)) / 4 + w * w * draws[:, ::step, half::step]
        beside = (field + down + middle + jnp.roll(middle, 1, 2)) / 4 + w * w * draws[:, half::step, ::step]
        upper, lower = jnp.stack([field, above], -1), jnp.stack([beside, middle], -1)  # [b, m, m, 2]
        field = jnp.stack([upper, lower], 2).reshape(b, 2 * field.shape[1], -1)
        w = w / decay
    field = field - field.min((1, 2), keepdims=True)
    return field / field.max((1, 2), keepdims=True)


def sample_bilinear(images: jax.Array, y: jax.Array, x: jax.Array, repeat_border: bool) -> jax.Array:
    """Samples images at coordinates y and x, f32[b, h, w], with bilinear interpolation and mirrored borders.

    The mirror repeats the outermost pixel with `repeat_border` (NumPy's "symmetric"), else not ("reflect").
    """
    mode = "reflect" if repeat_border else "mirror"  # SciPy's names
    sample = functools.partial(map_coordinates, order=1, mode=mode)
    return jax.vmap(jax.vmap(sample, (-1, None), -1))(images, (y, x))


def trace_copies(ys: jax.Array, xs: jax.Array, reach: jax.Array) -> jax.Array:
    """Returns the origin i32[b, h * w] of each pixel after sequential copies between nearby pixels.

    From the last row and column backward, each pixel more than `reach` from the start and at least `reach` from the
    end takes the current value at the offset (ys, xs), i32[b, h, w]. Pointer doubling follows all chains of copies in
    parallel.
    """
    b, h, w = ys.shape
    row, column = jnp.arange(h, dtype=jnp.int32)[:, None], jnp.arange(w, dtype=jnp.int32)

    def is_target(y: jax.Array, x: jax.Array) -> jax.Array:
        return (y > reach) & (y <= h - reach) & (y < h) & (x > reach) & (x <= w - reach) & (x < w)

    index = row * w + column
    y, x = jnp.clip(row + ys, 0, h - 1), jnp.clip(column + xs, 0, w - 1)
    source = y * w + x
    overwritten = is_target(y, x) & (source > index)  # an earlier copy has replaced the source
    original = h * w + jnp.where(is_target(row, column), source, index)  # h * w and above: the value before all copies
    pointer = jnp.where(is_target(row, column) & overwritten, source, original).reshape(b, -1)

    def follow(pointer: jax.Array) -> jax.Array:
        next_pointer = jnp.take_along_axis(pointer, jnp.where(pointer < h * w, pointer, 0), 1)
        return jnp.where(pointer < h * w, next_pointer, pointer)

    return lax.while_loop(lambda p: jnp.any(p < h * w), follow, pointer) - h * w

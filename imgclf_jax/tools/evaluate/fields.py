"""Blurs, shifts and random fields on whole batches in float32, which the corruptions are made of.

Images are f32[b, h, w, c]. What depends on a strength alone is a table that NumPy makes in float64 beforehand: a
matrix, a kernel, or places and weights. So one compiled program serves all strengths.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import ndimage

_EXACT = lax.Precision.HIGHEST

Tables = dict[str, Any]  # arrays by name


def gaussian_matrix(n: int, sigma: float, mode: str, truncate: float) -> np.ndarray:
    """f32[n, n]: a Gaussian filter of n values as SciPy has it, its kernel and border included."""
    if sigma == 0:
        return np.eye(n, dtype=np.float32)
    return ndimage.gaussian_filter1d(np.eye(n), sigma, axis=0, mode=mode, truncate=truncate).astype(np.float32)


def on_both_axes(rows: jax.Array, columns: jax.Array, images: jax.Array) -> jax.Array:
    """A matrix along the height, [m, h], and one along the width, [n, w], of [b, h, w, c]: [b, m, n, c]."""
    images = jnp.einsum("mh,bhwc->bmwc", rows, images, precision=_EXACT)
    return jnp.einsum("nw,bmwc->bmnc", columns, images, precision=_EXACT)


def disk_kernel(radius: float, alias_blur: float) -> np.ndarray:
    """f64[k, k], k being 17 or more: a disk of ones, made to sum to one, then blurred a little."""
    reach, size = (8, 3) if radius <= 8 else (int(radius), 5)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float64)
    places = np.arange(size) - size // 2
    line = np.exp(-(places**2) / (2 * alias_blur**2))
    line /= line.sum()
    disk /= disk.sum()
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, line, axis, mode="mirror")
    return disk


def filtered(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Each channel under a kernel [k, k], k odd. Borders are mirrored, the outermost pixel not repeated."""
    b, h, w, c = images.shape
    reach = kernel.shape[0] // 2
    rows, columns = (np.pad(np.arange(n), reach, "reflect") for n in (h, w))
    planes = images[:, rows][:, :, columns].transpose(0, 3, 1, 2).reshape(b * c, 1, h + 2 * reach, w + 2 * reach)
    out = lax.conv_general_dilated(planes, kernel[None, None], (1, 1), "VALID", precision=_EXACT)
    return out.reshape(b, c, h, w).transpose(0, 2, 3, 1)


def motion_tables(radius: float, sigma: float, longest: int) -> Tables:
    """The one-sided Gaussian `weights` f32[longest] of ImageMagick's motion blur, zeros after the first `count`."""
    count = 2 * int(np.ceil(radius)) + 1
    weights = np.exp(-(np.arange(count) ** 2) / (2 * sigma**2))
    weights = np.pad(weights / weights.sum(), (0, longest - count))
    return {"weights": weights.astype(np.float32), "count": np.int32(count)}


def motion_blurred(images: jax.Array, tables: Tables, degrees: jax.Array) -> jax.Array:
    """Each image averaged along the line that begins at the pixel and runs at its angle, f32[b], x to y.

    Step i is read at the whole pixel nearest to i times the direction; outside, the border goes on.
    """
    weights = tables["weights"]
    reach, (h, w) = weights.shape[0] - 1, images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), "edge")
    direction = jnp.stack([jnp.sin(jnp.deg2rad(degrees)), jnp.cos(jnp.deg2rad(degrees))], -1)  # [b, 2]

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        places = reach + jnp.ceil(i.astype(jnp.float32) * direction - 0.5).astype(jnp.int32)
        seen = jax.vmap(lambda image, at: lax.dynamic_slice(image, (at[0], at[1], 0), (h, w, image.shape[-1])))
        return total + weights[i] * seen(padded, places)

    return lax.fori_loop(0, tables["count"], add, jnp.zeros_like(images))


def zoom_tables(factors: np.ndarray, h: int, w: int, most: int) -> Tables:
    """Where the enlargements by these factors read, zeros after the first `count` of `most`.

    An enlargement takes the middle ceil(n / factor) pixels of each side, spreads them over round(factor times these)
    with their ends on its ends, and is cut to the middle n.
    """
    out: Tables = {"count": np.int32(len(factors))}
    for axis, n in (("rows", h), ("columns", w)):
        low, share = np.zeros((most, n), np.int32), np.zeros((most, n), np.float32)
        for i, factor in enumerate(factors):
            taken = int(np.ceil(n / factor))
            size = round(taken * factor)
            place = ((size - n) // 2 + np.arange(n)) * (taken - 1) / max(size - 1, 1)
            low[i] = np.minimum(place, max(taken - 2, 0)).astype(np.int32)
            share[i] = place - low[i]
            low[i] += (n - taken) // 2
        out[axis], out[f"{axis}_share"] = low, share
    return out


def enlarged(images: jax.Array, tables: Tables, i: jax.Array | int) -> jax.Array:
    """The i-th enlargement of `zoom_tables`, by linear interpolation."""
    for axis, name in ((1, "rows"), (2, "columns")):
        low, share = tables[name][i], jnp.expand_dims(tables[f"{name}_share"][i], tuple(range(1, 4 - axis)))
        high = jnp.minimum(low + 1, images.shape[axis] - 1)
        images = jnp.take(images, low, axis) * (1 - share) + jnp.take(images, high, axis) * share
    return images


def plasma(draws: jax.Array, decay: jax.Array) -> jax.Array:
    """The diamond-square fractal f32[b, n, n] on a torus, from 0 to 1, of draws from -1 to 1, [b, n, n].

    n is a power of two. The pixel (0, 0) begins at 0. In each round the middles of the squares, and then of their
    sides, become the mean of their four neighbours plus the pixel's own draw times w². w begins at 100 and is divided
    by `decay` after each round.
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


def read_between(images: jax.Array, y: jax.Array, x: jax.Array, repeat_border: bool) -> jax.Array:
    """The images at real places y and x, f32[b, h, w], by bilinear interpolation; beyond the border they are mirrored.

    The mirror stands outside of the outermost pixel with `repeat_border`, else on it.
    """
    b, h, w, c = images.shape
    flat = images.reshape(b, h * w, c)

    def folded(i: jax.Array, n: int) -> jax.Array:
        if repeat_border:
            i = i % (2 * n)
            return jnp.where(i >= n, 2 * n - 1 - i, i)
        i = i % max(2 * n - 2, 1)
        return jnp.where(i >= n, 2 * n - 2 - i, i)

    low_y, low_x = jnp.floor(y), jnp.floor(x)
    out = jnp.zeros_like(images)
    for dy in (0, 1):
        for dx in (0, 1):
            share = jnp.abs(1 - dy - (y - low_y)) * jnp.abs(1 - dx - (x - low_x))
            at = folded(low_y.astype(jnp.int32) + dy, h) * w + folded(low_x.astype(jnp.int32) + dx, w)
            out += share[..., None] * jnp.take_along_axis(flat, at.reshape(b, -1, 1), 1).reshape(b, h, w, c)
    return out


def last_copies(ys: jax.Array, xs: jax.Array, reach: jax.Array) -> jax.Array:
    """From where each pixel's value comes, i32[b, h * w], after pixels were copied from places nearby, one by one.

    From the last row and column backwards, a pixel more than `reach` from the first, and at least as far from the end,
    takes the value that lies (ys, xs), i32[b, h, w], further at that time. The chains of copies are followed in
    parallel, twice as far each time.
    """
    b, h, w = ys.shape
    row, column = jnp.arange(h, dtype=jnp.int32)[:, None], jnp.arange(w, dtype=jnp.int32)

    def moved(y: jax.Array, x: jax.Array) -> jax.Array:
        return (y > reach) & (y <= h - reach) & (y < h) & (x > reach) & (x <= w - reach) & (x < w)

    place = row * w + column
    y, x = jnp.clip(row + ys, 0, h - 1), jnp.clip(column + xs, 0, w - 1)
    source = y * w + x
    done = moved(y, x) & (source > place)  # the source had been copied to before
    old = h * w + jnp.where(moved(row, column), source, place)  # above h * w: the value before all copies
    pointer = jnp.where(moved(row, column) & done, source, old).reshape(b, -1)

    def follow(pointer: jax.Array) -> jax.Array:
        further = jnp.take_along_axis(pointer, jnp.where(pointer < h * w, pointer, 0), 1)
        return jnp.where(pointer < h * w, further, pointer)

    return lax.while_loop(lambda p: jnp.any(p < h * w), follow, pointer) - h * w

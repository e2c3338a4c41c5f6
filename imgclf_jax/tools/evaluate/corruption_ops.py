"""What each common corruption computes, in three kinds of functions: see `corruptions`.

`NAME_tables(constant, h, w, all)` makes arrays of a published constant, of the images' size, and of the constants of
all severities. `NAME_draw(key, image, tables)` draws for one example. `NAME(images, tables, draws)` is the corruption
of uint8[b, h, w, c].
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from imgclf_jax.core import rng
from imgclf_jax.tools.evaluate import fields
from imgclf_jax.tools.evaluate.fields import Tables
from imgclf_jax.tools.evaluate.jpeg import tables as quantization_tables


def unit(images: jax.Array) -> jax.Array:
    """uint8 levels as f32 from 0 to 1."""
    return images.astype(jnp.float32) / 255


def cut(values: jax.Array) -> jax.Array:
    """f32 from 0 to 1 to uint8, by truncation as published; what is nearly a whole level counts as that level."""
    return jnp.floor(jnp.clip(values, 0, 1) * 255 + 1e-4).astype(jnp.uint8)


def _rounded(values: jax.Array) -> jax.Array:
    """f32 levels to the nearest ones, still f32."""
    return jnp.floor(jnp.clip(values, 0, 255) + 0.5)


def number(constant: float, h: int, w: int, all: tuple[Any, ...]) -> Tables:
    """A constant that is one number, as `c`."""
    return {"c": np.float32(constant)}


def shot_tables(constant: float, h: int, w: int, all: tuple[Any, ...]) -> Tables:
    """`below` f32[256, n]: for each level, the chance of at most 0, 1, … photons, `c` being the mean for white.

    n + 1 is a power of two, 8 standard deviations above the greatest mean or more.
    """
    most = max(all)
    n = (1 << int(most + 8 * most**0.5).bit_length()) - 1
    below = stats.poisson.cdf(np.arange(n), np.arange(256)[:, None] / 255 * constant)
    return {"c": np.float32(constant), "below": below.astype(np.float32)}


def shot(images: jax.Array, tables: Tables, draws: jax.Array) -> jax.Array:
    """Each value as a count of photons: Poisson's law, by its quantile at a draw from 0 to 1 (a binary search)."""
    n = tables["below"].shape[1]
    first = images.astype(jnp.int32) * n
    count = jnp.zeros(images.shape, jnp.int32)
    for step in ((n + 1) >> k for k in range(1, n.bit_length() + 1)):
        smaller = tables["below"].reshape(-1)[first + count + step - 1] < draws
        count = jnp.where(smaller, count + step, count)
    return cut(count.astype(jnp.float32) / tables["c"])


def impulse_draw(key: jax.Array, image: jax.Array, tables: Tables) -> tuple[jax.Array, jax.Array]:
    """Which values are hit, and which of these become white: two of f32[h, w, c] from 0 to 1."""
    return jax.random.uniform(rng.fold(key, "hit"), image.shape), jax.random.uniform(rng.fold(key, "salt"), image.shape)


def impulse(images: jax.Array, tables: Tables, draws: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The share `c` of the values becomes white or black."""
    hit, salt = draws
    return jnp.where(hit <= tables["c"], jnp.where(salt <= 0.5, jnp.uint8(255), jnp.uint8(0)), images)


def defocus_tables(constant: Any, h: int, w: int, all: tuple[Any, ...]) -> Tables:
    """The `kernel`, cut to what is not zero at any severity."""
    kernels = [fields.disk_kernel(*each) for each in all]
    reach = max(int(np.abs(np.argwhere(k > 1e-12) - k.shape[0] // 2).max()) for k in kernels)
    kernel = kernels[all.index(constant)]
    kernel = np.pad(kernel, max(0, reach - kernel.shape[0] // 2))
    own = kernel.shape[0] // 2
    middle = slice(own - reach, own + reach + 1)
    return {"kernel": kernel[middle, middle].astype(np.float32)}


def glass_tables(constant: Any, h: int, w: int, all: tuple[Any, ...]) -> Tables:
    """The blur of `rows` and of `columns`, the `reach` of a move, and which rounds are run."""
    sigma, reach, rounds = constant
    rows, columns = (fields.gaussian_matrix(n, sigma, "nearest", 4) for n in (h, w))
    order = np.arange(max(each[2] for each in all))
    return {"rows": rows, "columns": columns, "reach": np.int32(reach), "in_round": order < rounds}


def glass_draw(key: jax.Array, image: jax.Array, tables: Tables) -> jax.Array:
    """i32[rounds, 2, h, w], from -reach to reach - 1."""
    shape = (tables["in_round"].shape[0], 2, *image.shape[:2])
    return jax.random.randint(key, shape, -tables["reach"], tables["reach"], jnp.int32)


def glass(images: jax.Array, tables: Tables, moves: jax.Array) -> jax.Array:
    """Blurred, then each pixel moved from nearby in each round, then blurred again."""
    b, h, w, c = images.shape

    def blurred(values: jax.Array) -> jax.Array:
        return cut(fields.on_both_axes(tables["rows"], tables["columns"], unit(values)))

    flat = blurred(images).reshape(b, h * w, c)
    for i in range(moves.shape[1]):
        at = fields.last_copies(moves[:, i, 0], moves[:, i, 1], tables["reach"])
        flat = jnp.where(tables["in_round"][i], jnp.take_along_axis(flat, at[..., None], 1), flat)
    return blurred(flat.reshape(images.shape))


def motion_tables(constant: Any, h: int, w: int, all: tuple[Any, ...]) -> Tables:
    """The weights of `fields.motion_blurred`."""
    return fields.motion_tables(constant[0], constant[1], 2 * max(each[0] for each in all) + 1)


def motion(images: jax.Array, tables: Tables, degrees: jax.Array) -> jax.Array:
    """Averaged along a line at an angle, and rounded as ImageMagick does."""
    return _rounded(fields.motion_blurred(images.astype(jnp.float32), tables, degrees)).astype(jnp.uint8)


def zoom_tables(constant: Any, h: int, w: int, all: tuple[Any, ...]) -> Tables:
    """Where the enlargements read; a constant is where the factors begin, end and how far apart they are."""
    return fields.zoom_tables(np.arange(*constant), h, w, max(len(np.arange(*each)) for each in all))


def zoom(images: jax.Array, tables: Tables, draws: Any) -> jax.Array:
    """The mean of the image and its enlargements."""
    images, count = unit(images), tables["count"]
    total = jax.lax.fori_loop(0, count, lambda i, out: out + fields.enlarged(images, tables, i), images)
    return cut(total / (count + 1).astype(jnp.float32))


def snow_tables(constant: Any, h: int, w: int, all: tuple[Any, ...]) -> Tables:
    """The numbers by name, where the enlarged flakes are read, and the weights of their `motion`."""
    mean, deviation, zoom, least, radius, sigma, kept = constant
    names = {"mean": mean, "deviation": deviation, "least": least, "kept": kept}
    return {
        **{name: np.float32(value) for name, value in names.items()},
        **fields.zoom_tables(np.array([zoom]), h, w, 1),
        "motion": fields.motion_tables(radius, sigma, 2 * max(each[4] for each in all) + 1),
    }


def snow_draw(key: jax.Array, image: jax.Array, tables: Tables) -> tuple[jax.Array, jax.Array]:
    """The flakes f32[h, w] before they grow, and the angle that they fall at."""
    angle = jax.random.uniform(rng.fold(key, "angle"), minval=-135, maxval=-45)
    return jax.random.normal(rng.fold(key, "flakes"), image.shape[:2]), angle


def snow(images: jax.Array, tables: Tables, draws: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The image made whiter, under flakes that fall and the same flakes turned by half a turn."""
    flakes, degrees = draws
    layer = fields.enlarged(tables["mean"] + tables["deviation"] * flakes[..., None], tables, 0)  # [b, h, w, 1]
    layer = cut(jnp.where(layer < tables["least"], 0.0, layer)).astype(jnp.float32)
    layer = _rounded(fields.motion_blurred(layer, tables["motion"], degrees)) / 255
    images, kept = unit(images), tables["kept"]
    weights = jnp.array([0.299, 0.587, 0.114], jnp.float32)
    luma = (images * weights).sum(-1, keepdims=True) if images.shape[-1] == 3 else images
    images = kept * images + (1 - kept) * jnp.maximum(images, luma * 1.5 + 0.5)
    return cut(images + layer + layer[:, ::-1, ::-1])


def fog_tables(constant: Any, h: int, w: int, all: tuple[Any, ...]) -> Tables:
    """How much fog there is, and how fast its details become weaker."""
    return {"amount": np.float32(constant[0]), "decay": np.float32(constant[1])}


def fog_draw(key: jax.Array, image: jax.Array, tables: Tables) -> jax.Array:
    """What `fields.plasma` is made of, f32[n, n], n being the least power of two that covers the image."""
    side = 1 << (max(image.shape[:2]) - 1).bit_length()
    return jax.random.uniform(key, (side, side), minval=-1, maxval=1)


def fog(images: jax.Array, tables: Tables, draws: jax.Array) -> jax.Array:
    """Plasma laid over the image, in the range that the image had."""
    h, w = images.shape[1:3]
    amount, images = tables["amount"], unit(images)
    most = images.max((1, 2, 3), keepdims=True)
    fog = fields.plasma(draws, tables["decay"])[:, :h, :w, None]
    return cut((images + amount * fog) * most / (most + amount))


def brightness(images: jax.Array, tables: Tables, draws: Any) -> jax.Array:
    """More of HSV's value. At the same hue and saturation the channels are proportional to it."""
    images = unit(images)
    value = images.max(-1, keepdims=True)
    more = jnp.minimum(value + tables["c"], 1)
    return cut(jnp.where(value > 0, images * (more / jnp.where(value > 0, value, 1)), more))


def contrast(images: jax.Array, tables: Tables, draws: Any) -> jax.Array:
    """The difference from each channel's mean, times `c`."""
    images = unit(images)
    mean = images.mean((1, 2), keepdims=True)
    return cut((images - mean) * tables["c"] + mean)


def elastic_tables(constant: Any, h: int, w: int, all: tuple[Any, ...]) -> Tables:
    """The blur of `rows` and of `columns`, the `strength` of each pixel's way, and the points' `affine` reach."""
    side = min(h, w)
    strength, sigma, affine = (side * share for share in constant)
    rows, columns = (fields.gaussian_matrix(n, sigma, "reflect", 3) for n in (h, w))
    return {"rows": rows, "columns": columns, "strength": np.float32(strength), "affine": np.float32(affine)}


def elastic_draw(key: jax.Array, image: jax.Array, tables: Tables) -> tuple[jax.Array, jax.Array]:
    """How far three points move, [3, 2] of (x, y), and each pixel's own way, [h, w, 2] of (x, y), from -1 to 1."""
    points = jax.random.uniform(rng.fold(key, "points"), (3, 2), minval=-1, maxval=1)
    return points, jax.random.uniform(rng.fold(key, "ways"), (*image.shape[:2], 2), minval=-1, maxval=1)


def elastic(images: jax.Array, tables: Tables, draws: tuple[jax.Array, jax.Array]) -> jax.Array:
    """An affine map that moves three points, then each pixel its own way, smooth over the image."""
    points, ways = draws
    h, w = images.shape[1:3]
    # The points at the centre plus s (1, 1), s (1, -1) and s (-1, -1) move. That is an affine map about the centre.
    s = min(h, w) // 3
    moves = tables["affine"] * points  # [b, 3, 2]
    first, second, third = moves[:, 0], moves[:, 1], moves[:, 2]
    linear = jnp.eye(2) + jnp.stack([second - third, first - second], -1) / (2 * s)  # [b, 2, 2]
    shift = (first + third) / 2
    y, x = jnp.meshgrid(jnp.arange(h, dtype=jnp.float32), jnp.arange(w, dtype=jnp.float32), indexing="ij")
    to_x, to_y = (place - size // 2 - shift[:, i, None, None] for i, (place, size) in enumerate(((x, w), (y, h))))
    a, b, c, d = (linear[:, i, j, None, None] for i in (0, 1) for j in (0, 1))
    determinant = a * d - b * c
    from_x, from_y = (d * to_x - b * to_y) / determinant, (a * to_y - c * to_x) / determinant
    moved = fields.read_between(unit(images), from_y + h // 2, from_x + w // 2, repeat_border=False)
    ways = tables["strength"] * fields.on_both_axes(tables["rows"], tables["columns"], ways)  # [b, h, w, 2]
    return cut(fields.read_between(moved, y + ways[..., 1], x + ways[..., 0], repeat_border=True))


def _box_matrix(n: int, m: int) -> np.ndarray:
    """f64[m, n]: n pixels to m, by the mean of those whose middles lie in each new pixel, as Pillow's BOX has it."""
    scale = max(n / m, 1)
    middles = (np.arange(m)[:, None] + 0.5) * n / m
    inside = ((np.arange(n) + 0.5 - middles) / scale > -0.5) & ((np.arange(n) + 0.5 - middles) / scale <= 0.5)
    return inside / inside.sum(1, keepdims=True)


def pixelate_tables(constant: float, h: int, w: int, all: tuple[Any, ...]) -> Tables:
    """Down and up again, [n, n] each: going up copies pixels, so that nothing is rounded between."""
    out = {}
    for axis, n in (("rows", h), ("columns", w)):
        small = max(1, int(n * constant))
        out[axis] = (_box_matrix(small, n) @ _box_matrix(n, small)).astype(np.float32)
    return out


def pixelate(images: jax.Array, tables: Tables, draws: Any) -> jax.Array:
    """Fewer pixels by Pillow's BOX, and back to as many as before."""
    exact = jax.lax.Precision.HIGHEST
    wide = jnp.einsum("nw,bhwc->bhnc", tables["columns"], images.astype(jnp.float32), precision=exact)
    # Pillow rounds after the width. Halves, which float32 may miss by a little, go up.
    wide = jnp.floor(wide + 0.5 + 1e-4)
    out = jnp.einsum("mh,bhwc->bmwc", tables["rows"], wide, precision=exact)
    return jnp.floor(out + 0.5 + 1e-4).astype(jnp.uint8)


def jpeg_tables(constant: int, h: int, w: int, all: tuple[Any, ...]) -> Tables:
    """The tables of quantization at a quality."""
    return {"quantization": quantization_tables(constant)}

"""Max-pooling on CPU, and convolution with it, on images whose channels come first, [c, h, w, b]; see `products.py`."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from imgclf_jax.models.cpu import products
from imgclf_jax.models.cpu.layout import accumulator, contiguous
from imgclf_jax.models.cpu.multilinear import multilinear


def window_cells(x: jax.Array, window: int) -> list[jax.Array]:
    """What lies at each place of a window, [a, h, w, d] → window**2 times [a, h // window, w // window, d]."""
    a, h, w, d = x.shape
    ho, wo = h // window, w // window  # without the rest at the edges
    windows = x[:, : ho * window, : wo * window].reshape(a, ho, window, wo, window, d)
    return [windows[:, :, i, :, j] for i, j in itertools.product(range(window), repeat=2)]


def greatest(cells: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The greatest of the cells, and the number of the cell that it is in, the first of equals: int8 where it fits."""
    maximum = functools.reduce(jnp.maximum, cells)
    place = jnp.full(maximum.shape, len(cells) - 1, jnp.int8 if len(cells) <= 128 else jnp.int32)
    for k in reversed(range(len(cells) - 1)):
        place = jnp.where(cells[k] == maximum, jnp.asarray(k, place.dtype), place)
    return maximum, place


def unpooled(place: jax.Array, gradient: jax.Array, window: int, first: int = 1) -> jax.Array:
    """The gradient at each output, from the places of the maxima and their gradient.

    The axis `first` and the one after it grow by `window`. At a place of -1 there is no gradient.
    """
    shape = list(place.shape)
    apart = [n for size in shape[first : first + 2] for n in (size, 1)]
    spread = [*shape[:first], *apart, *shape[first + 2 :]]
    whole = [*shape[:first], *(n * window for n in shape[first : first + 2]), *shape[first + 2 :]]
    cells = [window if axis in (first + 1, first + 3) else 1 for axis in range(len(spread))]
    cell = jnp.arange(window**2, dtype=place.dtype).reshape(cells)
    return jnp.where(place.reshape(spread) == cell, gradient.reshape(spread), 0).reshape(whole)


def _at_places(x: jax.Array, place: jax.Array, window: int, turn: bool) -> jax.Array:
    """What x [c, h, w, b] holds at the place of each maximum; zero where the place is -1."""
    del turn
    return _chosen(window_cells(x, window), place)


def _chosen(cells: list[jax.Array], place: jax.Array) -> jax.Array:
    """Of the cells that one whose number stands in `place`; zero where that is -1."""
    return functools.reduce(jnp.add, [jnp.where(place == k, cell, 0) for k, cell in enumerate(cells)])


def _grown(gradient: jax.Array, place: jax.Array, like: Any, window: int, turn: bool) -> jax.Array:
    """The transpose of `_at_places`; with `turn` in the order in which a convolution's gradients read it."""
    if turn:  # before it grows
        place, gradient = contiguous(place.transpose(1, 2, 3, 0)), contiguous(gradient.transpose(1, 2, 3, 0))
        grown = unpooled(place, gradient, window, first=0).transpose(3, 0, 1, 2)
    else:
        grown = lax.optimization_barrier(unpooled(place, gradient, window))
    rest = [(0, n - m) for n, m in zip(like.shape[1:3], grown.shape[1:3], strict=True)]
    return jnp.pad(grown, ((0, 0), *rest, (0, 0)))


_taken = multilinear("taken", _at_places, _grown)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, window: int) -> jax.Array:
    """The greatest of each window, [c, h, w, b] → [c, h // window, w // window, b], in x's dtype.

    Of equals the first gets the gradient.
    """
    return _max_pool(x, window)[0]


def _max_pool(x: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    return lax.optimization_barrier(greatest(window_cells(x, window)))


@max_pool.defjvp
def _max_pool_jvp(window: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    maximum, place = _max_pool(*primals, window)
    turn = products.wants_rows(maximum.dtype)  # what pooling follows is a convolution
    return maximum, _taken(tangents[0], place, window=window, turn=turn)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def pool_bias_relu(x: jax.Array, bias: jax.Array, window: int, dtype: Any) -> jax.Array:
    """relu(max_pool(x) + bias) in `dtype`, [f, h, w, b] → [f, h // window, w // window, b].

    The same as `max_pool(relu(x + bias))`, since adding a constant is monotonic, with a quarter of the element-wise
    work. All that is kept for the gradient is the place of each maximum in its window: one byte an output.
    """
    return _pooled(window_cells(x, window), bias, dtype)[0]


def _pooled(cells: list[jax.Array], bias: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Of the outputs at each place of a window: relu(the greatest + bias) in `dtype`, and the place that gave it.

    The place is the first of equals, int8, or -1 where ReLU gave zero.
    """
    maximum, place = greatest(cells)
    out = nn.relu(maximum + bias.astype(maximum.dtype)[:, None, None, None])
    place = jnp.where(out > 0, place, jnp.asarray(-1, place.dtype))
    return lax.optimization_barrier((out.astype(dtype), place))  # or XLA finds the places anew, several times


@pool_bias_relu.defjvp
def _pool_bias_relu_jvp(window: int, dtype: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, bias = primals
    d_x, d_bias = tangents
    out, place = _pooled(window_cells(x, window), bias, dtype)
    taken, wide = _taken(d_x.astype(dtype), place, window=window, turn=products.wants_rows(dtype)), accumulator(dtype)
    return out, (taken.astype(wide) + _passed(d_bias, place, dtype=wide)).astype(dtype)


_passed = multilinear(
    "passed",  # the bias's tangent, where ReLU lets it pass
    lambda bias, place, dtype: jnp.where(place >= 0, bias.astype(dtype)[:, None, None, None], 0),
    lambda gradient, place, like, dtype: jnp.sum(jnp.where(place >= 0, gradient.astype(dtype), 0), (1, 2, 3)),
)


def conv_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array, window: int, dtype: Any) -> jax.Array:
    """Convolution ("VALID"), max-pool, bias, ReLU: [c, h, w, b] and [kh, kw, c, f] → [f, ~h/window, ~w/window, b].

    In `dtype`. Only the outputs that fill windows are computed; the gradient of a maximum goes to the first of equals.
    """
    high, wide = (-((n - k + 1) % window) for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True))
    y = products.conv(x, kernel, (1, 1), ((0, high), (0, wide)), dtype, one_output=True)
    return pool_bias_relu(y, bias, window, dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def conv_pool_direct(x: jax.Array, kernel: jax.Array, bias: jax.Array, window: int, dtype: Any) -> jax.Array:
    """`conv_pool` for images of few channels, whose patches and whose convolution's output are many times their size.

    In one pass over the images that writes neither, in float32 (float64 for float64); the result is in `dtype`.
    """
    return _pooled(_direct_cells(x, kernel, window, accumulator(dtype)), bias, dtype)[0]


@conv_pool_direct.defjvp
def _conv_pool_direct_jvp(window: int, dtype: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, kernel, bias), (d_x, d_kernel, d_bias) = primals, tangents
    out, place = _pooled(_direct_cells(x, kernel, window, accumulator(dtype)), bias, dtype)
    static = {"window": window, "dtype": jnp.dtype(dtype)}
    d_out = _direct(d_x, kernel, place, **static) + _direct(x, d_kernel, place, **static)
    return out, (d_out + _passed(d_bias, place, dtype=accumulator(dtype))).astype(dtype)


def _direct_cells(x: jax.Array, kernel: jax.Array, window: int, dtype: Any) -> list[jax.Array]:
    """The convolution at each place of a window, [f, ho, wo, b] each."""
    kh, kw, c, _ = kernel.shape
    ho, wo = (x.shape[1] - kh + 1) // window, (x.shape[2] - kw + 1) // window
    images = contiguous(x.astype(dtype))

    def output(row: int, column: int) -> jax.Array:
        total = jnp.zeros((), dtype)
        for i, j, channel in itertools.product(range(kh), range(kw), range(c)):
            rows = slice(row + i, row + i + (ho - 1) * window + 1, window)
            columns = slice(column + j, column + j + (wo - 1) * window + 1, window)
            total += images[channel, rows, columns] * kernel[i, j, channel].astype(dtype)[:, None, None, None]
        return total

    return [output(row, column) for row, column in itertools.product(range(window), repeat=2)]


def _direct_at_places(x: jax.Array, kernel: jax.Array, place: jax.Array, window: int, dtype: Any) -> jax.Array:
    """The convolution at the place of each maximum, zero where there is none."""
    return _chosen(_direct_cells(x, kernel, window, accumulator(dtype)), place)


# The gradients are products over what a whole window sees: in that larger patch each output has a kernel's place.
def _direct_images(
    gradient: jax.Array, kernel: jax.Array, place: jax.Array, like: Any, window: int, dtype: Any
) -> jax.Array:
    (kh, kw, c, f), cells = kernel.shape, list(itertools.product(range(window), repeat=2))
    extent = (kh + window - 1, kw + window - 1)
    weights = jnp.zeros((*extent, c, len(cells), f), dtype)
    for k, (i, j) in enumerate(cells):
        weights = weights.at[i : i + kh, j : j + kw, :, k].set(kernel.astype(dtype))
    rows = products.rows(_by_cell(gradient, place, window, dtype), dtype)
    weights = weights.reshape(-1, len(cells) * f)
    return products.input_gradient(rows, weights, c, like.shape[1:3], extent, (window, window), dtype)


def _direct_kernel(
    x: jax.Array, gradient: jax.Array, place: jax.Array, like: Any, window: int, dtype: Any
) -> jax.Array:
    (kh, kw, c, f), cells = like.shape, list(itertools.product(range(window), repeat=2))
    extent, strides = (kh + window - 1, kw + window - 1), (window, window)
    size = place.shape[1], place.shape[2]
    patches = products.patches(x.astype(dtype), extent, strides, size)  # [extent * c, ho, wo, b]
    by_cell = _by_cell(gradient, place, window, dtype)
    sums = products.kernel_gradient(by_cell, patches.transpose(1, 2, 3, 0), dtype).reshape(len(cells), f, *extent, c)
    d_kernel = sum(sums[k, :, i : i + kh, j : j + kw] for k, (i, j) in enumerate(cells))  # [f, kh, kw, c]
    return jnp.transpose(d_kernel, (1, 2, 3, 0))


def _by_cell(gradient: jax.Array, place: jax.Array, window: int, dtype: Any) -> jax.Array:
    """The gradient at each place of a window, [cells * f, ho, wo, b]."""
    cells = [jnp.where(place == k, gradient.astype(dtype), 0) for k in range(window**2)]
    return lax.optimization_barrier(jnp.concatenate(cells))


_direct = multilinear("direct", _direct_at_places, _direct_images, _direct_kernel)

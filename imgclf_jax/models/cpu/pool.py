"""Convolution with max-pooling, and max-pooling, on mirrored images [c, h, w, b]; see `mirrored.py`."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from imgclf_jax.models.cpu import products as mirrored
from imgclf_jax.models.cpu.products import Pads


def window_cells(x: jax.Array, window: int) -> list[jax.Array]:
    """What lies at each place of a window, [a, h, w, d] → window**2 times [a, h // window, w // window, d]."""
    a, h, w, d = x.shape
    ho, wo = h // window, w // window  # without the rest at the edges
    windows = x[:, : ho * window, : wo * window].reshape(a, ho, window, wo, window, d)
    return [windows[:, :, i, :, j] for i, j in itertools.product(range(window), repeat=2)]


def _first_greatest(cells: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The greatest of the cells, and which cell it is in, the first of equals: int8 where it fits."""
    maximum = functools.reduce(jnp.maximum, cells)
    place = jnp.full(maximum.shape, len(cells) - 1, jnp.int8 if len(cells) <= 128 else jnp.int32)
    for k in reversed(range(len(cells) - 1)):
        place = jnp.where(cells[k] == maximum, jnp.asarray(k, place.dtype), place)
    return maximum, place


def pooled(cells: list[jax.Array], bias: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Of the outputs at each place of a window: relu(the greatest + bias) in `dtype`, and the place that gave it.

    The place is the first of equals, int8, or -1 where ReLU gave zero; it is all that the gradient needs.
    """
    maximum, place = _first_greatest(cells)
    out = nn.relu(maximum + bias.astype(maximum.dtype))
    place = jnp.where(out > 0, place, jnp.asarray(-1, place.dtype))
    return lax.optimization_barrier((out.astype(dtype), place))  # or XLA finds the places anew, several times


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, window: int) -> jax.Array:
    """The greatest of each window, [c, h, w, b] → [c, h // window, w // window, b], in x's dtype."""
    return _max_pool_forward(x, window)[0]


def _max_pool_forward(x: jax.Array, window: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    maximum, place = lax.optimization_barrier(_first_greatest(window_cells(x, window)))
    return maximum, (place, x[:0])


def _max_pool_backward(window: int, saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array]:
    place, x = saved  # of x only the shape
    if mirrored.wants_rows(x.dtype):  # turned before they grow: what pooling follows is a convolution
        place, gradient = mirrored.in_order(place.transpose(1, 2, 3, 0)), mirrored.rows(gradient, x.dtype)
        d_x = unpooled(place, gradient, window, first=0).transpose(3, 0, 1, 2)
    else:
        d_x = unpooled(place, lax.optimization_barrier(gradient), window)
    rest = [(0, n - m) for n, m in zip(x.shape[1:3], d_x.shape[1:3], strict=True)]
    return (jnp.pad(d_x, ((0, 0), *rest, (0, 0))),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def unpooled(place: jax.Array, gradient: jax.Array, window: int, first: int = 1) -> jax.Array:
    """The gradient at each output, from `pooled`'s places and gradient; `first` and the next axis grow by `window`."""
    shape = list(place.shape)
    apart = [n for size in shape[first : first + 2] for n in (size, 1)]
    spread = [*shape[:first], *apart, *shape[first + 2 :]]
    whole = [*shape[:first], *(n * window for n in shape[first : first + 2]), *shape[first + 2 :]]
    cells = [window if axis in (first + 1, first + 3) else 1 for axis in range(len(spread))]
    cell = jnp.arange(window**2, dtype=place.dtype).reshape(cells)
    return jnp.where(place.reshape(spread) == cell, gradient.reshape(spread), 0).reshape(whole)


def _bias_gradient(place: jax.Array, gradient: jax.Array, bias: jax.Array, dtype: Any) -> jax.Array:
    passed = jnp.where(place >= 0, gradient.astype(mirrored.accumulator(dtype)), 0)
    return jnp.sum(passed, (1, 2, 3)).astype(bias.dtype)


def _filled_windows(x: jax.Array, kernel: jax.Array, window: int) -> Pads:
    """What cuts off x [c, h, w, b] the rows and columns whose outputs would fill no window."""
    high, wide = (-((n - k + 1) % window) for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True))
    return (0, high), (0, wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def conv_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array, window: int, dtype: Any) -> jax.Array:
    """Convolution ("VALID"), max-pool, bias, ReLU: [c, h, w, b] and [kh, kw, c, f] → [f, ~h/window, ~w/window, b].

    In `dtype`. Only the outputs that fill windows are computed; the gradient of a maximum goes to the first of equals.
    """
    return _conv_pool_forward(x, kernel, bias, window, dtype)[0]


def _conv_pool_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, window: int, dtype: Any
) -> tuple[jax.Array, Any]:
    padded = mirrored.pad(x, _filled_windows(x, kernel, window), dtype)
    y = mirrored.outputs(padded, kernel.astype(dtype), (1, 1), (1, 1))
    out, place = pooled(window_cells(y, window), bias[:, None, None, None], dtype)
    return out, (place, x, kernel, bias)


def _conv_pool_backward(window: int, dtype: Any, saved: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    place, x, kernel, bias = saved
    if mirrored.wants_rows(dtype):  # turned before they grow
        places = mirrored.in_order(place.transpose(1, 2, 3, 0))
        d_outputs = lax.optimization_barrier(unpooled(places, mirrored.rows(gradient, dtype), window, first=0))
    else:
        d_outputs = mirrored.rows(lax.optimization_barrier(unpooled(place, gradient.astype(dtype), window)), dtype)
    pads = _filled_windows(x, kernel, window)
    return *mirrored.conv_gradients(x, kernel, (1, 1), pads, dtype, d_outputs), _bias_gradient(
        place, gradient, bias, dtype
    )


conv_pool.defvjp(_conv_pool_forward, _conv_pool_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def conv_pool_direct(x: jax.Array, kernel: jax.Array, bias: jax.Array, window: int, dtype: Any) -> jax.Array:
    """`conv_pool` for images of few channels, whose patches and whose convolution's output are many times their size.

    In one pass over the images that writes neither, in float32 (float64 for float64); the result is in `dtype`.
    """
    return _direct_forward(x, kernel, bias, window, dtype)[0]


def _direct_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array, window: int, dtype: Any) -> tuple[jax.Array, Any]:
    kh, kw, c, _ = kernel.shape
    ho, wo = (x.shape[1] - kh + 1) // window, (x.shape[2] - kw + 1) // window
    images = mirrored.in_order(x.astype(mirrored.accumulator(dtype)))

    def output(row: int, column: int) -> jax.Array:
        """[f, ho, wo, b]: the convolution at one place of each window."""
        total = jnp.zeros((), images.dtype)
        for i, j, channel in itertools.product(range(kh), range(kw), range(c)):
            rows = slice(row + i, row + i + (ho - 1) * window + 1, window)
            columns = slice(column + j, column + j + (wo - 1) * window + 1, window)
            total += images[channel, rows, columns] * kernel[i, j, channel][:, None, None, None]
        return total

    cells = [output(row, column) for row, column in itertools.product(range(window), repeat=2)]
    out, place = pooled(cells, bias[:, None, None, None], dtype)
    return out, (place, x, kernel, bias)


def _direct_backward(window: int, dtype: Any, saved: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    """As products over what a whole window sees: each of its outputs has a kernel's place in that larger patch."""
    place, x, kernel, bias = saved
    kh, kw, c, f = kernel.shape
    extent, strides, size = (kh + window - 1, kw + window - 1), (window, window), place.shape[1:3]
    cells = list(itertools.product(range(window), repeat=2))
    by_cell = [jnp.where(place == k, gradient.astype(dtype), 0) for k in range(len(cells))]
    by_cell = lax.optimization_barrier(jnp.concatenate(by_cell))  # [cells * f, ho, wo, b]

    patches = mirrored.patches(x.astype(dtype), extent, strides, size)  # [extent * c, ho, wo, b]
    products = mirrored.kernel_gradient(by_cell, patches.transpose(1, 2, 3, 0), dtype).reshape(
        len(cells), f, *extent, c
    )
    d_kernel = sum(products[k, :, i : i + kh, j : j + kw] for k, (i, j) in enumerate(cells))  # [f, kh, kw, c]

    weights = jnp.zeros((*extent, c, len(cells), f), dtype)
    for k, (i, j) in enumerate(cells):
        weights = weights.at[i : i + kh, j : j + kw, :, k].set(kernel.astype(dtype))
    # Nobody needs the gradient of the first layer's images; XLA leaves it out then.
    d_x = mirrored.input_gradient(
        mirrored.rows(by_cell, dtype), weights.reshape(-1, len(cells) * f), x, extent, strides, dtype
    )
    return d_x, jnp.transpose(d_kernel, (1, 2, 3, 0)).astype(kernel.dtype), _bias_gradient(place, gradient, bias, dtype)


conv_pool_direct.defvjp(_direct_forward, _direct_backward)

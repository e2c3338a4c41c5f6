"""Layers on images that lie mirrored, [c, h, w, b], as matrix products: what is fast on CPU.

There XLA's convolution and its gradients are slow, and a matrix product is near the machine's peak only where rows are
long, contiguous, and in the order that its library wants: the left side [m, k], the right side [k, n], neither
transposed. With the batch innermost, the patches of a convolution are copies of whole rows, in the order that the
forward product and the kernel's gradient want; element-wise operations run over contiguous vectors. For the gradients
the outputs' gradient is turned once, [f, ho, wo, b] → [ho, wo, b, f], after which both products have their order too.

Products have operands in `dtype`, float32 or bfloat16 (or float64), and sums in float32 (float64 for float64).
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

# The dimension numbers of [m, k] and [k, …] → [m, …], and of [ho, wo, b, k] and [k, n] → [ho, wo, b, n].
_FIRST, _LAST = (((1,), (0,)), ((), ())), (((3,), (0,)), ((), ()))


def _wants_rows(dtype: Any) -> bool:
    """Whether the gradients' products are faster on `_rows` by more than it costs to turn them: in bfloat16."""
    return dtype == jnp.bfloat16


def _accumulator(dtype: Any) -> Any:
    return jnp.dtype(dtype if dtype == jnp.float64 else jnp.float32)


def _product(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """[m, k] times [k, …] → [m, …] in `dtype`."""
    return lax.dot_general(a, b, _FIRST, preferred_element_type=dtype)


def _in_order(x: jax.Array) -> jax.Array:
    """x itself, computed here and laid out in memory as its shape says.

    Without it XLA leaves a transposed x where it lies and reads it across its rows, or computes x anew, as often as
    needed, inside of what reads it. Outside of `jit` it has no say.
    """
    if not isinstance(x, jax.core.Tracer):
        return x
    return lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))


def _rows(x: jax.Array, dtype: Any) -> jax.Array:
    """[f, ho, wo, b] → [ho, wo, b, f] in `dtype`: turned in memory where products want it, else in name only."""
    x = x.astype(dtype).transpose(1, 2, 3, 0)
    return _in_order(x) if _wants_rows(dtype) else x


def _patches(x: jax.Array, kernel: tuple[int, int], strides: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """[c, h, w, b] → [kh * kw * c, ho, wo, b]: under each output position, the inputs that its kernel sees."""
    (kh, kw), (sh, sw), (ho, wo) = kernel, strides, size
    c, b = x.shape[0], x.shape[3]
    if (kh, kw) == (1, 1):
        return x[:, : (ho - 1) * sh + 1 : sh, : (wo - 1) * sw + 1 : sw]
    corners = jnp.asarray([(i, j) for i in range(kh) for j in range(kw)])  # [kh * kw, 2]
    x = _in_order(x)

    def seen(corner: jax.Array) -> jax.Array:
        extent = (c, (ho - 1) * sh + 1, (wo - 1) * sw + 1, b)
        return lax.dynamic_slice(x, (0, corner[0], corner[1], 0), extent)[:, ::sh, ::sw]  # [c, ho, wo, b]

    # One gather, which runs on all cores.
    return lax.optimization_barrier(jax.vmap(seen)(corners)).reshape(kh * kw * c, ho, wo, b)


def _sum_patches(patches: jax.Array, size: tuple[int, int], strides: tuple[int, int], dtype: Any) -> jax.Array:
    """The transpose of `_patches`, summed in `dtype`: [ho, wo, b, kh, kw, c] → [h, w, b, c], (h, w) being `size`."""
    (h, w), (sh, sw) = size, strides
    ho, wo, b, kh, kw, c = patches.shape
    zero = jnp.zeros((), dtype)
    total = jnp.zeros((h, w, b, c), dtype)
    for i, j in itertools.product(range(kh), range(kw)):
        below, right = h - i - (ho - 1) * sh - 1, w - j - (wo - 1) * sw - 1
        place = ((i, below, sh - 1), (j, right, sw - 1), (0, 0, 0), (0, 0, 0))
        total += lax.pad(patches[:, :, :, i, j].astype(dtype), zero, place)
    return total


def _input_gradient(
    gradient: jax.Array, weights: jax.Array, x: jax.Array, extent: tuple[int, int], strides: tuple[int, int], dtype: Any
) -> jax.Array:
    """Of x [c, h, w, b], from that of the outputs, `_rows`, and weights [kh * kw * c, f] for patches of x."""
    if _wants_rows(dtype):
        d_patches = lax.dot_general(gradient, _in_order(weights.T), _LAST, preferred_element_type=dtype)
    else:
        d_patches = jnp.moveaxis(_product(weights, jnp.moveaxis(gradient, 3, 0), dtype), 0, 3)
    d_patches = d_patches.reshape(*gradient.shape[:3], *extent, x.shape[0])
    d_x = _sum_patches(d_patches, (x.shape[1], x.shape[2]), strides, _accumulator(dtype)).astype(x.dtype)
    if _wants_rows(dtype):
        d_x = _in_order(d_x)
    return _in_order(d_x.transpose(3, 0, 1, 2))


def _kernel_gradient(patches: jax.Array, gradient: jax.Array, dtype: Any) -> jax.Array:
    """[k, ho, wo, b] and [ho, wo, b, f] → [k, f], the product summed over all positions."""
    positions = (((1, 2, 3), (0, 1, 2)), ((), ()))
    sums = lax.dot_general(patches, gradient, positions, preferred_element_type=_accumulator(dtype))
    return lax.optimization_barrier(sums)  # or XLA merges a transpose of it into the product


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], size: tuple[int, int], dtype: Any) -> jax.Array:
    """The first `size` = (ho, wo) outputs of a "VALID" convolution, [c, h, w, b] and [kh, kw, c, f] → [f, ho, wo, b].

    The result is in float32 (float64 for float64).
    """
    return _conv_forward(x, kernel, strides, size, dtype)[0]


def _conv_forward(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], size: tuple[int, int], dtype: Any
) -> tuple[jax.Array, Any]:
    kh, kw, c, f = kernel.shape
    patches = _patches(x.astype(dtype), (kh, kw), strides, size)
    # Transposed outside of the product: XLA 0.12 cannot run a bfloat16 product whose left side it must transpose.
    weights = _in_order(kernel.astype(dtype).reshape(kh * kw * c, f).T)
    return _product(weights, patches, _accumulator(dtype)), (x, kernel)


def _conv_gradients(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], dtype: Any, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Those of x and kernel, from that of the outputs, `_rows`."""
    kh, kw, c, f = kernel.shape
    size = (gradient.shape[0], gradient.shape[1])
    patches = _patches(x.astype(dtype), (kh, kw), strides, size)  # the forward pass's, computed once
    d_kernel = _kernel_gradient(patches, gradient, dtype).reshape(kernel.shape).astype(kernel.dtype)
    weights = kernel.astype(dtype).reshape(kh * kw * c, f)
    return _input_gradient(gradient, weights, x, (kh, kw), strides, dtype), d_kernel


def _conv_backward(
    strides: tuple[int, int], size: tuple[int, int], dtype: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _conv_gradients(*saved, strides, dtype, _rows(gradient, dtype))


conv.defvjp(_conv_forward, _conv_backward)


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
    """The greatest of each window, [c, h, w, b] → [c, h // window, w // window, b]."""
    return _max_pool_forward(x, window)[0]


def _max_pool_forward(x: jax.Array, window: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    maximum, place = _first_greatest(window_cells(x, window))
    return maximum, (place, x[:0])


def _max_pool_backward(window: int, saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array]:
    place, x = saved  # of x only the shape
    d_x = unpooled(place, gradient, window)
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
    passed = jnp.where(place >= 0, gradient.astype(_accumulator(dtype)), 0)
    return jnp.sum(passed, (1, 2, 3)).astype(bias.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def conv_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array, window: int, dtype: Any) -> jax.Array:
    """Convolution ("VALID"), max-pool, bias, ReLU: [c, h, w, b] and [kh, kw, c, f] → [f, ~h/window, ~w/window, b].

    In `dtype`. Only the outputs that fill windows are computed; the gradient of a maximum goes to the first of equals.
    """
    return _conv_pool_forward(x, kernel, bias, window, dtype)[0]


def _conv_pool_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, window: int, dtype: Any
) -> tuple[jax.Array, Any]:
    kh, kw, _, _ = kernel.shape
    ho, wo = (x.shape[1] - kh + 1) // window, (x.shape[2] - kw + 1) // window
    y, _ = _conv_forward(x, kernel, (1, 1), (ho * window, wo * window), dtype)
    out, place = pooled(window_cells(y, window), bias[:, None, None, None], dtype)
    return out, (place, x, kernel, bias)


def _conv_pool_backward(window: int, dtype: Any, saved: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    place, x, kernel, bias = saved
    if _wants_rows(dtype):  # turned before they grow
        places = _in_order(place.transpose(1, 2, 3, 0))
        d_outputs = lax.optimization_barrier(unpooled(places, _rows(gradient, dtype), window, first=0))
    else:
        d_outputs = _rows(lax.optimization_barrier(unpooled(place, gradient.astype(dtype), window)), dtype)
    return *_conv_gradients(x, kernel, (1, 1), dtype, d_outputs), _bias_gradient(place, gradient, bias, dtype)


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
    images = _in_order(x.astype(_accumulator(dtype)))

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

    patches = _patches(x.astype(dtype), extent, strides, size)  # [extent * c, ho, wo, b]
    products = _kernel_gradient(by_cell, patches.transpose(1, 2, 3, 0), dtype).reshape(len(cells), f, *extent, c)
    d_kernel = sum(products[k, :, i : i + kh, j : j + kw] for k, (i, j) in enumerate(cells))  # [f, kh, kw, c]

    weights = jnp.zeros((*extent, c, len(cells), f), dtype)
    for k, (i, j) in enumerate(cells):
        weights = weights.at[i : i + kh, j : j + kw, :, k].set(kernel.astype(dtype))
    # Nobody needs the gradient of the first layer's images; XLA leaves it out then.
    d_x = _input_gradient(_rows(by_cell, dtype), weights.reshape(-1, len(cells) * f), x, extent, strides, dtype)
    return d_x, jnp.transpose(d_kernel, (1, 2, 3, 0)).astype(kernel.dtype), _bias_gradient(place, gradient, bias, dtype)


conv_pool_direct.defvjp(_direct_forward, _direct_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """The flattened image times the kernel, [c, h, w, b] and [h * w * c, d] → [d, b], in float32 (or float64)."""
    return _dense_forward(x, kernel, dtype)[0]


def _dense_forward(x: jax.Array, kernel: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    c, h, w, b = x.shape
    weights = kernel.astype(dtype).reshape(h, w, c, -1).transpose(3, 2, 0, 1).reshape(-1, c * h * w)
    y = _product(_in_order(weights), x.astype(dtype).reshape(-1, b), _accumulator(dtype))
    return lax.optimization_barrier(y), (x, kernel)


def _dense_backward(dtype: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    c, h, w, b = x.shape
    turned = _in_order(gradient.astype(dtype).T)  # [b, d]
    d_kernel = _product(x.astype(dtype).reshape(-1, b), turned, _accumulator(dtype))
    d_kernel = d_kernel.reshape(c, h, w, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)
    d_x = _product(turned, _in_order(kernel.astype(dtype).T), dtype).reshape(b, h, w, c)
    return jnp.swapaxes(d_x, 0, 3).astype(x.dtype), d_kernel.astype(kernel.dtype)


dense.defvjp(_dense_forward, _dense_backward)

"""Max pooling and fused convolution + pooling on CPU, on channel-first images [c, h, w, b]; see `matmuls.py`.

`slices`, `window_slices` and `take_max` are for images [b, h, w, c].
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from imgclf_jax.models.cpu import matmuls
from imgclf_jax.models.cpu.layout import accumulator, contiguous
from imgclf_jax.models.cpu.multilinear import multilinear
from imgclf_jax.models.cpu.onednn import interleave


def _window_slices(x: jax.Array, window: int) -> list[jax.Array]:
    """One slice per offset within the window: [a, h, w, d] → window**2 times [a, h // window, w // window, d]."""
    a, h, w, d = x.shape
    ho, wo = h // window, w // window  # cuts off rows and columns that fill no window
    windows = x[:, : ho * window, : wo * window].reshape(a, ho, window, wo, window, d)
    return [windows[:, :, i, :, j] for i, j in itertools.product(range(window), repeat=2)]


def first_argmax(slices: list[jax.Array], maximum: jax.Array) -> jax.Array:
    """The index of the first slice that has the element-wise maximum: int8 if it fits."""
    argmax = jnp.full(maximum.shape, len(slices) - 1, jnp.int8 if len(slices) <= 128 else jnp.int32)
    for k in reversed(range(len(slices) - 1)):
        argmax = jnp.where(slices[k] == maximum, jnp.asarray(k, argmax.dtype), argmax)
    return argmax


def _max_and_argmax(slices: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    maximum = functools.reduce(jnp.maximum, slices)
    return maximum, first_argmax(slices, maximum)


def _unpool(argmax: jax.Array, gradient: jax.Array, window: int, first: int = 1) -> jax.Array:
    """Max-unpooling: puts each gradient at its argmax and zeros elsewhere; an argmax of -1 has no gradient.

    The axes `first` and `first + 1` grow by the factor `window`.
    """
    shape = list(argmax.shape)
    interleaved = [n for size in shape[first : first + 2] for n in (size, 1)]
    expanded = [*shape[:first], *interleaved, *shape[first + 2 :]]
    result = [*shape[:first], *(n * window for n in shape[first : first + 2]), *shape[first + 2 :]]
    offsets = [window if axis in (first + 1, first + 3) else 1 for axis in range(len(expanded))]
    offset = jnp.arange(window**2, dtype=argmax.dtype).reshape(offsets)
    return jnp.where(argmax.reshape(expanded) == offset, gradient.reshape(expanded), 0).reshape(result)


def _take(x: jax.Array, argmax: jax.Array, window: int, channels_last: bool) -> jax.Array:
    """Takes x [c, h, w, b] at the argmax of each window; zero where it is -1."""
    del channels_last
    return select(_window_slices(x, window), argmax)


def select(slices: list[jax.Array], argmax: jax.Array) -> jax.Array:
    """Selects element-wise the slice numbered `argmax`; zero where it is -1."""
    return functools.reduce(jnp.add, [jnp.where(argmax == k, x, 0) for k, x in enumerate(slices)])


def _take_transpose(
    gradient: jax.Array, argmax: jax.Array, like: jax.ShapeDtypeStruct, window: int, channels_last: bool
) -> jax.Array:
    """The transpose of `_take`; with `channels_last` in the memory layout that a convolution's gradients read."""
    if channels_last:  # transpose before unpooling, while the arrays are small
        argmax, gradient = contiguous(argmax.transpose(1, 2, 3, 0)), contiguous(gradient.transpose(1, 2, 3, 0))
        unpooled = _unpool(argmax, gradient, window, first=0).transpose(3, 0, 1, 2)
    else:
        unpooled = lax.optimization_barrier(_unpool(argmax, gradient, window))
    rest = [(0, n - m) for n, m in zip(like.shape[1:3], unpooled.shape[1:3], strict=True)]
    return jnp.pad(unpooled, ((0, 0), *rest, (0, 0)))


_take_max = multilinear("take_max", _take, _take_transpose)


def slices(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> list[jax.Array]:
    """One strided slice [b, ho, wo, c] of x [b, h, w, c] for each offset within the window."""
    ho, wo = ((n - (k - 1) * d - 1) // s + 1
              for n, k, d, s in zip(x.shape[1:3], window, dilation, strides, strict=True))  # fmt: skip

    def at(i: int, j: int) -> jax.Array:
        rows, columns = (slice(k * d, k * d + (n - 1) * s + 1, s)
                         for k, d, n, s in zip((i, j), dilation, (ho, wo), strides, strict=True))  # fmt: skip
        return x[:, rows, columns]

    return [at(i, j) for i in range(window[0]) for j in range(window[1])]


def window_slices(x: jax.Array, window: int, strides: int, padding: int, fill: float) -> list[jax.Array]:
    """The `slices` of a square window over x [b, h, w, c] padded with `fill`."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=fill)
    return slices(x, (window, window), (strides, strides))


def _take_slices(x: jax.Array, argmax: jax.Array, window: int, strides: int, padding: int) -> jax.Array:
    return select(window_slices(x, window, strides, padding, 0), argmax)


def _take_slices_transpose(
    gradient: jax.Array, argmax: jax.Array, like: jax.ShapeDtypeStruct, window: int, strides: int, padding: int
) -> jax.Array:
    """The transpose of `_take_slices`: inputs at the same offset modulo the stride are in the same windows.

    So the gradients of an offset are sums of arrays as small as the outputs, and the offsets interleave.
    """
    gradient, argmax = lax.optimization_barrier((gradient, argmax))
    padded = [n + 2 * padding for n in like.shape[1:3]]
    size = [-(-n // strides) for n in padded]
    free = [n - m for n, m in zip(size, gradient.shape[1:3], strict=True)]  # inputs behind the last window

    def at(row: int, column: int) -> jax.Array:
        total = jnp.zeros((len(gradient), *size, like.shape[3]), gradient.dtype)
        for i, j in itertools.product(range(row, window, strides), range(column, window, strides)):
            part = jnp.where(argmax == i * window + j, gradient, 0)
            shifts = ((offset // strides, room - offset // strides, 0)
                      for offset, room in zip((i, j), free, strict=True))  # fmt: skip
            total += lax.pad(part, jnp.zeros((), part.dtype), ((0, 0, 0), *shifts, (0, 0, 0)))
        return lax.optimization_barrier(total)

    phases = [[at(row, column) for column in range(strides)] for row in range(strides)]
    y = interleave(phases, (len(gradient), *padded, like.shape[3]))
    return y[:, padding : padding + like.shape[1], padding : padding + like.shape[2]]


take_max = multilinear("take_slices", _take_slices, _take_slices_transpose)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, window: int) -> jax.Array:
    """Max pooling, [c, h, w, b] → [c, h // window, w // window, b] in x's dtype.

    Among ties the first gets the gradient.
    """
    return _max_pool(x, window)[0]


def _max_pool(x: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    return lax.optimization_barrier(_max_and_argmax(_window_slices(x, window)))


@max_pool.defjvp
def _max_pool_jvp(window: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    maximum, argmax = _max_pool(*primals, window)
    channels_last = matmuls.wants_channels_last(maximum.dtype)  # pooling follows a convolution
    return maximum, _take_max(tangents[0], argmax, window=window, channels_last=channels_last)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def pool_bias_relu(x: jax.Array, bias: jax.Array, window: int, dtype: DTypeLike) -> jax.Array:
    """relu(max_pool(x) + bias) in `dtype`, [f, h, w, b] → [f, h // window, w // window, b].

    Equals `max_pool(relu(x + bias))`, since adding a constant is monotonic, for a quarter of the element-wise work. The
    only residual of the backward pass is the argmax of each window, one byte per output.
    """
    return _pool_bias_relu(_window_slices(x, window), bias, dtype)[0]


def _pool_bias_relu(slices: list[jax.Array], bias: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Returns relu(max(slices) + bias) in `dtype`, and the argmax: int8, the first among ties, -1 where ReLU is 0."""
    maximum, argmax = _max_and_argmax(slices)
    out = nn.relu(maximum + bias.astype(maximum.dtype)[:, None, None, None])
    argmax = jnp.where(out > 0, argmax, jnp.asarray(-1, argmax.dtype))
    return lax.optimization_barrier((out.astype(dtype), argmax))  # or XLA recomputes the argmax in each consumer


@pool_bias_relu.defjvp
def _pool_bias_relu_jvp(
    window: int, dtype: DTypeLike, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    x, bias = primals
    d_x, d_bias = tangents
    out, argmax = _pool_bias_relu(_window_slices(x, window), bias, dtype)
    layout = matmuls.wants_channels_last(dtype)
    d_max, wide = _take_max(d_x.astype(dtype), argmax, window=window, channels_last=layout), accumulator(dtype)
    return out, (d_max.astype(wide) + _bias_where_active(d_bias, argmax, dtype=wide)).astype(dtype)


_bias_where_active = multilinear(
    "bias_where_active",  # the tangent of the bias, zero where ReLU is
    lambda bias, argmax, dtype: jnp.where(argmax >= 0, bias.astype(dtype)[:, None, None, None], 0),
    lambda gradient, argmax, like, dtype: jnp.sum(jnp.where(argmax >= 0, gradient.astype(dtype), 0), (1, 2, 3)),
)


def conv_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array, window: int, dtype: DTypeLike) -> jax.Array:
    """Convolution ("VALID"), max-pool, bias, ReLU: [c, h, w, b] and [kh, kw, c, f] → [f, ~h/window, ~w/window, b].

    In `dtype`. Outputs that fill no window are not computed; the gradient of a maximum goes to the first among ties.
    """
    high, wide = (-((n - k + 1) % window) for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True))
    y = matmuls.conv(x, kernel, (1, 1), ((0, high), (0, wide)), dtype, one_output=True)
    return pool_bias_relu(y, bias, window, dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def conv_pool_direct(x: jax.Array, kernel: jax.Array, bias: jax.Array, window: int, dtype: DTypeLike) -> jax.Array:
    """`conv_pool` for images of few channels, whose patches and convolution output would be many times their size.

    One pass over the images that stores neither, in float32 (float64 for float64); the result is in `dtype`.
    """
    return _pool_bias_relu(_direct_slices(x, kernel, window, accumulator(dtype)), bias, dtype)[0]


@conv_pool_direct.defjvp
def _conv_pool_direct_jvp(
    window: int, dtype: DTypeLike, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    (x, kernel, bias), (d_x, d_kernel, d_bias) = primals, tangents
    out, argmax = _pool_bias_relu(_direct_slices(x, kernel, window, accumulator(dtype)), bias, dtype)
    static = {"window": window, "dtype": jnp.dtype(dtype)}
    d_out = _direct(d_x, kernel, argmax, **static) + _direct(x, d_kernel, argmax, **static)
    return out, (d_out + _bias_where_active(d_bias, argmax, dtype=accumulator(dtype))).astype(dtype)


def _direct_slices(x: jax.Array, kernel: jax.Array, window: int, dtype: DTypeLike) -> list[jax.Array]:
    """The convolution output for each offset within the window, [f, ho, wo, b] each."""
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


def _direct_take(x: jax.Array, kernel: jax.Array, argmax: jax.Array, window: int, dtype: DTypeLike) -> jax.Array:
    """The convolution output at the argmax of each window; zero where it is -1."""
    return select(_direct_slices(x, kernel, window, accumulator(dtype)), argmax)


# The gradients are matmuls over the receptive field of a whole window, in which each output has a shifted kernel.
def _direct_images(
    gradient: jax.Array, kernel: jax.Array, argmax: jax.Array, like: jax.ShapeDtypeStruct, window: int, dtype: DTypeLike
) -> jax.Array:
    (kh, kw, c, f), offsets = kernel.shape, list(itertools.product(range(window), repeat=2))
    extent = (kh + window - 1, kw + window - 1)
    weights = jnp.zeros((*extent, c, len(offsets), f), dtype)
    for k, (i, j) in enumerate(offsets):
        weights = weights.at[i : i + kh, j : j + kw, :, k].set(kernel.astype(dtype))
    by_offset = matmuls.channels_last(_by_offset(gradient, argmax, window, dtype), dtype)
    weights = weights.reshape(-1, len(offsets) * f)
    return matmuls.input_gradient(by_offset, weights, c, like.shape[1:3], extent, (window, window), dtype)


def _direct_kernel(
    x: jax.Array, gradient: jax.Array, argmax: jax.Array, like: jax.ShapeDtypeStruct, window: int, dtype: DTypeLike
) -> jax.Array:
    (kh, kw, c, f), offsets = like.shape, list(itertools.product(range(window), repeat=2))
    extent, strides = (kh + window - 1, kw + window - 1), (window, window)
    size = argmax.shape[1], argmax.shape[2]
    patches = matmuls.im2col(x.astype(dtype), extent, strides, size)  # [extent * c, ho, wo, b]
    by_offset = _by_offset(gradient, argmax, window, dtype)
    sums = matmuls.kernel_gradient(by_offset, patches.transpose(1, 2, 3, 0), dtype)
    sums = sums.reshape(len(offsets), f, *extent, c)
    d_kernel = sum(sums[k, :, i : i + kh, j : j + kw] for k, (i, j) in enumerate(offsets))  # [f, kh, kw, c]
    return jnp.transpose(d_kernel, (1, 2, 3, 0))


def _by_offset(gradient: jax.Array, argmax: jax.Array, window: int, dtype: DTypeLike) -> jax.Array:
    """The gradient for each offset within the window, zero off the argmax: [window**2 * f, ho, wo, b]."""
    slices = [jnp.where(argmax == k, gradient.astype(dtype), 0) for k in range(window**2)]
    return lax.optimization_barrier(jnp.concatenate(slices))


_direct = multilinear("direct", _direct_take, _direct_images, _direct_kernel)

"""Max pooling on CPU, over axes 1 and 2 of images [b, h, w, c] or, features first, [c, h, w, b]."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from imgclf_jax.models.cpu.layout import accumulator
from imgclf_jax.models.cpu.multilinear import multilinear


def slices(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> list[jax.Array]:
    """One strided slice [·, ho, wo, ·] of x [·, h, w, ·] for each offset within the window."""
    ho, wo = ((n - (k - 1) * d - 1) // s + 1
              for n, k, d, s in zip(x.shape[1:3], window, dilation, strides, strict=True))  # fmt: skip

    def at(i: int, j: int) -> jax.Array:
        rows, columns = (slice(k * d, k * d + (n - 1) * s + 1, s)
                         for k, d, n, s in zip((i, j), dilation, (ho, wo), strides, strict=True))  # fmt: skip
        return x[:, rows, columns]

    return [at(i, j) for i in range(window[0]) for j in range(window[1])]


def window_slices(x: jax.Array, window: int, strides: int, padding: int, fill: float) -> list[jax.Array]:
    """The `slices` of a square window over x padded with `fill`."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=fill)
    return slices(x, (window, window), (strides, strides))


def first_argmax(slices: list[jax.Array], maximum: jax.Array) -> jax.Array:
    """The index of the first slice that has the element-wise maximum: int8 if it fits."""
    argmax = jnp.full(maximum.shape, len(slices) - 1, jnp.int8 if len(slices) <= 128 else jnp.int32)
    for k in reversed(range(len(slices) - 1)):
        argmax = jnp.where(slices[k] == maximum, jnp.asarray(k, argmax.dtype), argmax)
    return argmax


def interleave(phases: Sequence[Sequence[jax.Array]], shape: tuple[int, ...]) -> jax.Array:
    """Arranges y[p][q] [b, n, m, c] to [b, s * n, t * m, c], where row s * i + p, column t * j + q is y[p][q][i, j].

    Then crops to `shape`.
    """
    if len(phases) == len(phases[0]) == 1:
        return phases[0][0][:, : shape[1], : shape[2]]
    y = jnp.stack([jnp.stack(row, 3) for row in phases], 2)  # [b, n, s, m, t, c]
    b, n, s, m, t, c = y.shape
    return lax.optimization_barrier(y.reshape(b, n * s, m * t, c)[:, : shape[1], : shape[2]])


def _unpool(argmax: jax.Array, gradient: jax.Array, shape: tuple[int, ...], window: int) -> jax.Array:
    """Max-unpooling [a, ho, wo, d] → `shape` [a, h, w, d]: puts each gradient at its argmax and zeros elsewhere."""
    a, ho, wo, d = argmax.shape
    offset = jnp.arange(window**2, dtype=argmax.dtype).reshape(1, 1, window, 1, window, 1)
    expanded = (a, ho, 1, wo, 1, d)
    y = jnp.where(argmax.reshape(expanded) == offset, gradient.reshape(expanded), 0)
    y = lax.optimization_barrier(y.reshape(a, ho * window, wo * window, d))
    return jnp.pad(y, ((0, 0), (0, shape[1] - ho * window), (0, shape[2] - wo * window), (0, 0)))


def take(x: jax.Array, argmax: jax.Array, window: int, strides: int, padding: int) -> jax.Array:
    """Takes x at the `first_argmax` of each of its `window_slices`; zero where it is -1."""
    taken = [jnp.where(argmax == k, y, 0) for k, y in enumerate(window_slices(x, window, strides, padding, 0))]
    return functools.reduce(jnp.add, taken)


def _take_transpose(
    gradient: jax.Array, argmax: jax.Array, like: jax.ShapeDtypeStruct, window: int, strides: int, padding: int
) -> jax.Array:
    """The transpose of `take`: inputs at the same offset modulo the stride are in the same windows.

    So the gradients of an offset are sums of arrays as small as the outputs, and the offsets interleave.
    """
    if window == strides and not padding:
        return _unpool(argmax, gradient, like.shape, window)
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


_take_product = multilinear("take_max", take, _take_transpose)


def take_max(x: jax.Array, argmax: jax.Array, window: int, strides: int, padding: int) -> jax.Array:
    """`take` with a faster transpose."""
    return _take_product(x, argmax, window=window, strides=strides, padding=padding)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def pool_bias_relu(x: jax.Array, bias: jax.Array, window: int, dtype: DTypeLike) -> jax.Array:
    """relu(max_pool(x) + bias) in `dtype`, [f, h, w, b] → [f, h // window, w // window, b].

    Equals `max_pool(relu(x + bias))`, since adding a constant is monotonic, for a quarter of the element-wise work. The
    only residual of the backward pass is the argmax of each window, one byte per output.
    """
    return _pool_bias_relu(x, bias, window, dtype)[0]


def _pool_bias_relu(x: jax.Array, bias: jax.Array, window: int, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Returns relu(max + bias) in `dtype`, and the argmax: int8, the first among ties, -1 where ReLU is 0."""
    parts = window_slices(x, window, window, 0, 0)
    maximum = functools.reduce(jnp.maximum, parts)
    out = nn.relu(maximum + bias.astype(maximum.dtype)[:, None, None, None])
    argmax = first_argmax(parts, maximum)
    argmax = jnp.where(out > 0, argmax, jnp.asarray(-1, argmax.dtype))
    return lax.optimization_barrier((out.astype(dtype), argmax))  # or XLA recomputes the argmax in each consumer


@pool_bias_relu.defjvp
def _pool_bias_relu_jvp(
    window: int, dtype: DTypeLike, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    (x, bias), (d_x, d_bias), wide = primals, tangents, accumulator(dtype)
    out, argmax = _pool_bias_relu(x, bias, window, dtype)
    d_max = take_max(d_x.astype(dtype), argmax, window, window, 0).astype(wide)
    return out, (d_max + jnp.where(argmax >= 0, d_bias.astype(wide)[:, None, None, None], 0)).astype(dtype)

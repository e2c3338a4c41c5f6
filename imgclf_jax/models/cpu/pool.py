"""Max pooling on CPU, over axes 1 and 2 of images [b, h, w, c] or, features first, [c, h, w, b]."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from imgclf_jax.models.cpu.matmuls import accumulator
from imgclf_jax.models.cpu.multilinear import multilinear


def window_slices(x: jax.Array, window: int, strides: int, padding: int, fill: float) -> list[jax.Array]:
    """One strided slice [·, ho, wo, ·] of x [·, h, w, ·], padded with `fill`, for each offset within the window."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=fill)
    h, w = ((n - window) // strides * strides + 1 for n in x.shape[1:3])
    return [x[:, i : i + h : strides, j : j + w : strides] for i in range(window) for j in range(window)]


def first_argmax(slices: list[jax.Array], maximum: jax.Array) -> jax.Array:
    """The index of the first slice that has the element-wise maximum: int8 if it fits."""
    argmax = jnp.full(maximum.shape, len(slices) - 1, jnp.int8 if len(slices) <= 128 else jnp.int32)
    for k in reversed(range(len(slices) - 1)):
        argmax = jnp.where(slices[k] == maximum, jnp.asarray(k, argmax.dtype), argmax)
    return argmax


def take_max(x: jax.Array, argmax: jax.Array, window: int, strides: int, padding: int) -> jax.Array:
    """Takes x at the `first_argmax` of each of its `window_slices`; zero where it is -1."""
    taken = [jnp.where(argmax == k, y, 0) for k, y in enumerate(window_slices(x, window, strides, padding, 0))]
    return functools.reduce(jnp.add, taken)


def interleave(phases: Sequence[Sequence[jax.Array]], shape: tuple[int, ...]) -> jax.Array:
    """Arranges y[p][q] [b, n, m, c] to [b, s * n, t * m, c], where row s * i + p, column t * j + q is y[p][q][i, j].

    Then crops to `shape`.
    """
    if len(phases) == len(phases[0]) == 1:
        return phases[0][0]
    y = jnp.stack([jnp.stack(row, 3) for row in phases], 2)  # [b, n, s, m, t, c]
    b, n, s, m, t, c = y.shape
    return lax.optimization_barrier(y.reshape(b, n * s, m * t, c)[:, : shape[1], : shape[2]])


def _unpool(gradient: jax.Array, argmax: jax.Array, like: jax.ShapeDtypeStruct, window: int) -> jax.Array:
    """Max-unpooling [a, ho, wo, d] → [a, h, w, d] as `like`: puts each gradient at its argmax and zeros elsewhere."""
    a, ho, wo, d = argmax.shape
    offset = jnp.arange(window**2, dtype=argmax.dtype).reshape(1, 1, window, 1, window, 1)
    expanded = (a, ho, 1, wo, 1, d)
    y = jnp.where(argmax.reshape(expanded) == offset, gradient.reshape(expanded), 0)
    y = y.reshape(a, ho * window, wo * window, d)
    return jnp.pad(y, ((0, 0), (0, like.shape[1] - ho * window), (0, like.shape[2] - wo * window), (0, 0)))


def _put_max(
    gradient: jax.Array, argmax: jax.Array, like: jax.ShapeDtypeStruct, window: int, strides: int, padding: int
) -> jax.Array:
    """The transpose of `take_max`: inputs at the same offset modulo the stride are in the same windows.

    So the gradients of an offset are sums of arrays as small as the outputs, and the offsets interleave.
    """
    if window == strides and not padding:
        return _unpool(gradient, argmax, like, window)
    gradient, argmax = lax.optimization_barrier((gradient, argmax))
    (b, ho, wo, c), (h, w) = gradient.shape, like.shape[1:3]
    n, m = -(-(h + 2 * padding) // strides), -(-(w + 2 * padding) // strides)

    def at(row: int, column: int) -> jax.Array:
        total = jnp.zeros((b, n, m, c), gradient.dtype)
        for i, j in itertools.product(range(row, window, strides), range(column, window, strides)):
            part, down, right = jnp.where(argmax == i * window + j, gradient, 0), i // strides, j // strides
            room = (0, 0, 0), (down, n - ho - down, 0), (right, m - wo - right, 0), (0, 0, 0)
            total += lax.pad(part, jnp.zeros((), part.dtype), room)
        return lax.optimization_barrier(total)

    phases = [[at(row, column) for column in range(strides)] for row in range(strides)]
    y = interleave(phases, (b, h + 2 * padding, w + 2 * padding, c))
    return y[:, padding : padding + h, padding : padding + w]


# `take_max`, called with `window=`, `strides=` and `padding=`, with a faster transpose.
take_max_fast = multilinear("take_max", take_max, _put_max)


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
    d_max = take_max_fast(d_x.astype(dtype), argmax, window=window, strides=window, padding=0).astype(wide)
    return out, (d_max + jnp.where(argmax >= 0, d_bias.astype(wide)[:, None, None, None], 0)).astype(dtype)

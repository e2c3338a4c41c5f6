"""Broadcasting features [c] to [..., c] and the sum back to them, each the other's gradient, on CPU."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from imgclf_jax.models.cpu.multilinear import multilinear

_MAX_ROWS = 7  # with more, XLA copies the computation of x too often to fuse it


def _broadcast(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts values [c] to `shape` [..., c]."""
    return lax.broadcast_in_dim(values, shape, (len(shape) - 1,))


def _sum(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The sum [c] over all axes but the last of x, which has this `shape`.

    Images [b, h, w, c] are summed in steps that vectorize: fused with the computation of x, one is ten times slower.
    """
    if x.ndim != 4:
        return jnp.sum(x, range(x.ndim - 1))
    b, h, w, c = shape
    k = max(k for k in range(1, _MAX_ROWS + 1) if h % k == 0)
    grouped = x.reshape(b, h // k, k, w, c)
    few_rows = functools.reduce(jnp.add, [grouped[:, :, i] for i in range(k)])
    return jnp.sum(lax.optimization_barrier(jnp.sum(lax.optimization_barrier(few_rows), 0)), (0, 1))


# Both are called with `shape=`.
broadcast = multilinear("broadcast", _broadcast, lambda gradient, like, shape: _sum(gradient, shape))
sum_features = multilinear("sum", _sum, lambda gradient, like, shape: _broadcast(gradient, shape))

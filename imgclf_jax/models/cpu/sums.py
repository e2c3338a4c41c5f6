"""Reductions over all axes except the features, or over the features, and their transposes, on CPU."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from imgclf_jax.models.cpu.multilinear import multilinear

_MOST_ROWS = 7  # with more, XLA copies the computation of x too often to fuse it


def _broadcast(values: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(values, shape, (axis,))


def _sum(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Sums images in steps that vectorize, in either layout."""
    if axis == 0 and len(shape) > 2:
        return jnp.sum(lax.optimization_barrier(jnp.sum(x, range(1, x.ndim - 1))), 1)
    if axis == 3:  # [b, h, w, c]; fused with the computation of x, the sum over b is ten times slower
        return jnp.sum(lax.optimization_barrier(jnp.sum(lax.optimization_barrier(_fewer_rows(x)), 0)), (0, 1))
    return jnp.sum(x, [i for i in range(x.ndim) if i != axis])


def _fewer_rows(x: jax.Array) -> jax.Array:
    """Sums groups of rows: [b, h, w, c] → [b, h // k, w, c].

    XLA fuses these additions with the computation of x, which then need not be written to memory.
    """
    b, h, w, c = x.shape
    k = max(k for k in range(1, _MOST_ROWS + 1) if h % k == 0)
    grouped = x.reshape(b, h // k, k, w, c)
    return functools.reduce(jnp.add, [grouped[:, :, i] for i in range(k)])


_broadcast_along = multilinear(
    "broadcast_along", _broadcast, lambda gradient, like, shape, axis: _sum(gradient, shape, axis)
)
_sum_except = multilinear("sum_except", _sum, lambda gradient, like, shape, axis: _broadcast(gradient, shape, axis))


def broadcast_along(values: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Broadcasts values [c] along `axis` to `shape`; the gradient is `sum_except`."""
    return _broadcast_along(values, shape=tuple(shape), axis=axis)


def sum_except(x: jax.Array, axis: int) -> jax.Array:
    """The sum over all axes except `axis` → [c]; the gradient is `broadcast_along`."""
    return _sum_except(x, shape=x.shape, axis=axis)


_outer = multilinear(
    "outer",
    lambda values, x: values.reshape(-1, *[1] * (x.ndim - 1)) * x,
    lambda gradient, x, like: _sum(gradient * x, gradient.shape, 0),
    # A matrix-vector product is faster than a sum over an axis other than the last.
    lambda values, gradient, like: jnp.expand_dims(
        lax.dot_general(values, gradient, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST), 0
    ),
)


def outer(values: jax.Array, x: jax.Array) -> jax.Array:
    """The outer product of values [d] and x [1, …] → [d, …]."""
    return _outer(values, x)

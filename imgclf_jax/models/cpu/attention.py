"""Attention on CPU, as matmuls on feature-first arrays; see `matmuls.py`."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from imgclf_jax.models.cpu.layout import accumulator, contiguous
from imgclf_jax.models.cpu.multilinear import multilinear


def _matmul(a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Batched matmul, [b, h, m, k] times [b, h, k, n] → [b, h, m, n] in `dtype`."""
    return lax.dot_general(a, b, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=dtype)


def _transpose(x: jax.Array) -> jax.Array:
    return contiguous(x.swapaxes(2, 3))


# k [b, h, d, keys] and q [b, h, d, queries] → [b, h, keys, queries], in at least float32.
_scores = multilinear(
    "scores",
    lambda k, q: _matmul(_transpose(k), q, accumulator(q.dtype)),
    lambda scores, q, like: _matmul(q, _transpose(scores.astype(q.dtype)), q.dtype),
    lambda k, scores, like: _matmul(k, scores.astype(k.dtype), k.dtype),
)
# v [b, h, d, keys] and maps [b, h, keys, queries] → [b, h, d, queries], in v's dtype.
_mix_values = multilinear(
    "mix_values",
    lambda v, maps: _matmul(v, maps.astype(v.dtype), v.dtype),
    lambda mixed, maps, like: _matmul(contiguous(mixed), _transpose(maps.astype(mixed.dtype)), mixed.dtype),
    lambda v, mixed, like: _matmul(_transpose(v), contiguous(mixed), like.dtype),
)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Multi-head attention of q, k and v [h, d, b, n] of one dtype → ([h, d, b, n] in that dtype, maps).

    The attention maps are f32[b, h, keys, queries] (float64 for float64).
    """
    wide = accumulator(q.dtype)
    q, k, v = (contiguous(x.transpose(2, 0, 1, 3)) for x in (q, k, v))  # [b, h, d, n]
    scores = _scores(k, q) * jnp.asarray(q.shape[2] ** -0.5, wide)
    maps = _softmax(scores, q.dtype)
    return _mix_values(v, maps).transpose(1, 2, 0, 3), maps


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _softmax(x: jax.Array, residual_dtype: DTypeLike) -> jax.Array:
    """Softmax over the keys, axis 2, so that sums vectorize. The backward pass uses it rounded to `residual_dtype`."""
    return jax.nn.softmax(x, 2)


@_softmax.defjvp
def _softmax_jvp(
    residual_dtype: DTypeLike, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    y = _softmax(*primals, residual_dtype)
    rounded = y.astype(residual_dtype).astype(y.dtype)
    weighted = rounded * tangents[0]
    return y, weighted - rounded * jnp.sum(weighted, 2, keepdims=True)

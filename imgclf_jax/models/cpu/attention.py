"""Attention on CPU, as matrix products on arrays whose features come first; see `products.py`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from imgclf_jax.models.cpu.layout import accumulator, contiguous
from imgclf_jax.models.cpu.multilinear import multilinear


def _each(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """The product of each two matrices, [b, h, m, k] times [b, h, k, n] → [b, h, m, n] in `dtype`."""
    return lax.dot_general(a, b, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=dtype)


def _turned(x: jax.Array) -> jax.Array:
    return contiguous(x.swapaxes(2, 3))


# Of k [b, h, d, keys] and q [b, h, d, queries] → [b, h, keys, queries], in float32 at least.
_scores = multilinear(
    "scores",
    lambda k, q: _each(_turned(k), q, accumulator(q.dtype)),
    lambda scores, q, like: _each(q, _turned(scores.astype(q.dtype)), q.dtype),
    lambda k, scores, like: _each(k, scores.astype(k.dtype), k.dtype),
)
# Of v [b, h, d, keys] and maps [b, h, keys, queries] → [b, h, d, queries], in v's dtype.
_mixed = multilinear(
    "mixed",
    lambda v, maps: _each(v, maps.astype(v.dtype), v.dtype),
    lambda mixed, maps, like: _each(contiguous(mixed), _turned(maps.astype(mixed.dtype)), mixed.dtype),
    lambda v, mixed, like: _each(_turned(v), contiguous(mixed), like.dtype),
)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention of each head, of q, k and v [h, d, b, n] of one dtype → ([h, d, b, n] in that dtype, its maps).

    The maps are f32[b, h, keys, queries] (float64 for float64).
    """
    wide = accumulator(q.dtype)
    q, k, v = (contiguous(x.transpose(2, 0, 1, 3)) for x in (q, k, v))  # [b, h, d, n]
    scores = _scores(k, q) * jnp.asarray(q.shape[2] ** -0.5, wide)
    maps = _softmax(scores, q.dtype)
    return _mixed(v, maps).transpose(1, 2, 0, 3), maps


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _softmax(x: jax.Array, kept: Any) -> jax.Array:
    """Over the keys, so that its sums run along vectors. For the gradient it is rounded to the dtype `kept`."""
    return jax.nn.softmax(x, 2)


@_softmax.defjvp
def _softmax_jvp(kept: Any, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = _softmax(*primals, kept)
    low = y.astype(kept).astype(y.dtype)
    weighted = low * tangents[0]
    return y, weighted - low * jnp.sum(weighted, 2, keepdims=True)

"""Attention over tokens, in the form that is fast on the platform."""

from typing import Any

import jax
import jax.numpy as jnp

from imgclf_jax.core import platform
from imgclf_jax.models.cpu.attention import attention as attention_on_cpu
from imgclf_jax.models.cpu.layout import accumulator, features_first, features_last, on_cpu


def attention(qkv: jax.Array, heads: int, with_maps: bool = False) -> tuple[jax.Array, jax.Array | None]:
    """Attention of each head (Vaswani et al. 2017, arXiv:1706.03762), [b, n, 3 * d] → ([b, n, d], its maps).

    `qkv` are queries, keys and values one after the other, each [heads, d / heads]. The softmax is in float32 at least.
    The maps, f32[b, heads, queries, keys], are None unless asked for: off CPU they are not computed then.
    """
    b, n, width = qkv.shape
    if on_cpu():
        split = features_first(qkv).reshape(3, heads, -1, b, n)
        y, by_keys = attention_on_cpu(*split)
        return features_last(y.reshape(width // 3, b, n)), by_keys.swapaxes(2, 3) if with_maps else None
    q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, heads, -1), 2, 0)  # [b, n, heads, d / heads]
    maps: jax.Array | None = None
    if with_maps:
        maps = _maps(q, k)
        y = jnp.einsum("bhqk,bkhd->bqhd", maps.astype(qkv.dtype), v)
    elif _by_cudnn(q):
        with jax.numpy_dtype_promotion("standard"):  # which its code needs, and ours does without
            y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    else:
        y = _attend(q, k, v)
    return y.reshape(b, n, width // 3), maps if with_maps else None


def _maps(q: jax.Array, k: jax.Array) -> jax.Array:
    """f32[b, heads, queries, keys], or f64: the softmax of the scores of q and k [b, n, heads, d]."""
    wide = accumulator(q.dtype)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide)
    return jax.nn.softmax(scores * jnp.asarray(q.shape[-1] ** -0.5, wide), -1)


@jax.custom_jvp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention [b, n, heads, d] in XLA's own operations."""
    return jnp.einsum("bhqk,bkhd->bqhd", _maps(q, k).astype(v.dtype), v)


@_attend.defjvp
def _attend_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """All that is kept for its transpose are q, k, v and the maps, in their dtype, and all its products are in it."""
    q, k, v = primals
    d_q, d_k, d_v = tangents
    maps = _maps(q, k).astype(v.dtype)
    d_scores = jnp.einsum("bqhd,bkhd->bhqk", d_q, k) + jnp.einsum("bqhd,bkhd->bhqk", q, d_k)
    wide, d_scores = maps.astype(accumulator(q.dtype)), d_scores.astype(accumulator(q.dtype))
    d_scores = d_scores * jnp.asarray(q.shape[-1] ** -0.5, d_scores.dtype)
    d_maps = (wide * (d_scores - jnp.sum(wide * d_scores, -1, keepdims=True))).astype(v.dtype)
    y = jnp.einsum("bhqk,bkhd->bqhd", maps, v)
    return y, jnp.einsum("bhqk,bkhd->bqhd", d_maps, v) + jnp.einsum("bhqk,bkhd->bqhd", maps, d_v)


def _by_cudnn(q: jax.Array) -> bool:
    """Whether cuDNN's fused attention can be used: on a GPU from Ampere on, in 16 bits, for heads up to 128 wide.

    JAX asks the GPU itself what it can do, so a program for an absent GPU gets XLA's form.
    """
    if platform.current() != "gpu" or platform.compute_capability() < 8.0:
        return False
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128

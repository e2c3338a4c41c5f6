"""Multi-head self-attention, by cuDNN where it can, else in plain XLA operations."""

import jax
import jax.numpy as jnp

from imgclf_jax.core import platform
from imgclf_jax.models.cpu.matmuls import accumulator


def attention(qkv: jax.Array, heads: int, with_maps: bool = False) -> tuple[jax.Array, jax.Array | None]:
    """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762): qkv [b, n, 3 * d] → ([b, n, d], maps).

    The last axis of `qkv` holds queries, keys and values in turn, each [heads, d / heads]. The softmax is at least
    float32. The attention maps are f32[b, heads, queries, keys], or None without `with_maps`.
    """
    b, n, width = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, heads, -1), 2, 0)  # [b, n, heads, d / heads]
    maps = _maps(q, k) if with_maps else None
    if maps is not None:
        y = jnp.einsum("bhqk,bkhd->bqhd", maps.astype(qkv.dtype), v)
    elif _can_use_cudnn(q):
        with jax.numpy_dtype_promotion("standard"):  # JAX's own implementation relies on it
            y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    else:
        y = _attend(q, k, v)
    return y.reshape(b, n, width // 3), maps


def _maps(q: jax.Array, k: jax.Array) -> jax.Array:
    """Attention maps, softmax(q kᵀ / √d) of q and k [b, n, heads, d]: f32 or f64[b, heads, queries, keys]."""
    wide = accumulator(q.dtype)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide)
    return jax.nn.softmax(scores * jnp.asarray(q.shape[-1] ** -0.5, wide), -1)


@jax.custom_jvp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention [b, n, heads, d] in plain XLA operations."""
    return jnp.einsum("bhqk,bkhd->bqhd", _maps(q, k).astype(v.dtype), v)


@_attend.defjvp
def _attend_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Keeps only q, k, v and the maps, in v's dtype, for the backward pass; all its matmuls are in that dtype."""
    q, k, v = primals
    d_q, d_k, d_v = tangents
    maps = _maps(q, k).astype(v.dtype)
    d_scores = jnp.einsum("bqhd,bkhd->bhqk", d_q, k) + jnp.einsum("bqhd,bkhd->bhqk", q, d_k)
    wide_maps, d_scores = maps.astype(accumulator(q.dtype)), d_scores.astype(accumulator(q.dtype))
    d_scores = d_scores * jnp.asarray(q.shape[-1] ** -0.5, d_scores.dtype)
    d_maps = (wide_maps * (d_scores - jnp.sum(wide_maps * d_scores, -1, keepdims=True))).astype(v.dtype)
    y = jnp.einsum("bhqk,bkhd->bqhd", maps, v)
    return y, jnp.einsum("bhqk,bkhd->bqhd", d_maps, v) + jnp.einsum("bhqk,bkhd->bqhd", maps, d_v)


def _can_use_cudnn(q: jax.Array) -> bool:
    """Whether cuDNN's fused attention applies: Ampere or newer, a 16-bit dtype, heads of at most 128 features.

    Programs compiled for absent GPUs have an unknown compute capability (0) and use the XLA form.
    """
    if platform.current() != "gpu" or platform.compute_capability() < 8.0:
        return False
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128

"""Attention over tokens, in the form that is fast on the platform."""

from typing import Literal

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
    if with_maps or qkv.dtype == jnp.float64:  # of which JAX's own rounds the softmax to float32
        wide = accumulator(qkv.dtype)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide)
        maps = jax.nn.softmax(scores * jnp.asarray(q.shape[-1] ** -0.5, wide), -1)
        y = jnp.einsum("bhqk,bkhd->bqhd", maps.astype(qkv.dtype), v)
    else:
        with jax.numpy_dtype_promotion("standard"):  # which its code needs, and ours does without
            y = jax.nn.dot_product_attention(q, k, v, implementation=_implementation(q))
    return y.reshape(b, n, width // 3), maps if with_maps else None


def _implementation(q: jax.Array) -> Literal["xla", "cudnn"]:
    """cuDNN's fused attention where it can be: on a GPU from Ampere on, in 16 bits, for heads up to 128 wide.

    JAX asks the GPU itself what it can do, so a program for a GPU that is not here gets XLA's form.
    """
    if (
        platform.current() != "gpu"
        or q.dtype not in (jnp.bfloat16, jnp.float16)
        or q.shape[-1] % 8
        or q.shape[-1] > 128
    ):
        return "xla"
    devices = [d for d in jax.devices() if d.platform == "gpu"]
    capable = devices and all(float(getattr(d, "compute_capability", "0")) >= 8 for d in devices)
    return "cudnn" if capable else "xla"

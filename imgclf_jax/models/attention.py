"""Attention, by cuDNN where it can, else in plain XLA operations, and rotary position embeddings."""

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from imgclf_jax.core import platform
from imgclf_jax.models.cpu.matmuls import accumulator

ROPES = ("dinov3", "eva02")


@dataclass(frozen=True)
class Rope:
    """Axial rotary position embeddings (Su et al. 2021, arXiv:2104.09864) of a grid of `rows` by `columns` patches.

    A head's features form pairs: half of them turn by the patch's row, half by its column. Coordinates and frequencies,
    for k below a quarter q of the features, are in "dinov3" (Siméoni et al. 2025, arXiv:2508.10104) patch centers in
    [-1, 1] times 2π and 100^(-k / q), in "eva02" (Fang et al. 2023, arXiv:2303.11331) indices scaled to a grid of 16 by
    16 and 10,000^(-k / q). "dinov3" pairs feature i with i + 2 q, "eva02" adjacent ones.
    """

    kind: str
    rows: int
    columns: int

    def rotate(self, x: jax.Array) -> jax.Array:
        """Rotates x [b, n, heads, d], whose last tokens are the patches; those before, such as a class token, stay."""
        prefix, half, dinov3 = x.shape[1] - self.rows * self.columns, x.shape[3] // 2, self.kind == "dinov3"
        cos, sin = (jnp.asarray(table, accumulator(x.dtype)) for table in _cos_sin(self, half))
        y = x[:, prefix:].astype(cos.dtype)
        a, b = (y[..., :half], y[..., half:]) if dinov3 else (y[..., ::2], y[..., 1::2])
        turned = a * cos - b * sin, b * cos + a * sin
        y = jnp.concatenate(turned, -1) if dinov3 else jnp.stack(turned, -1).reshape(y.shape)
        return jnp.concatenate([x[:, :prefix], y.astype(x.dtype)], 1)


@lru_cache(maxsize=16)  # the same arrays in all blocks, so that a program holds them once
def _cos_sin(rope: Rope, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the angle of each pair of a head, f64[patches, 1, pairs]."""
    sides, base = (rope.rows, rope.columns), 100.0 if rope.kind == "dinov3" else 10_000.0
    axes = [2 * np.pi * ((2 * np.arange(n) + 1) / n - 1) if base == 100 else np.arange(n) * 16 / n for n in sides]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 1, 2, 1)
    angles = (grid * base ** -np.linspace(0, 1, pairs // 2, endpoint=False)).reshape(len(grid), 1, pairs)
    return np.cos(angles), np.sin(angles)


def attend(module: nn.Module, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention (Vaswani et al. 2017, arXiv:1706.03762) of q [b, m, heads, d] over k and v [b, n, heads, d], as q.

    The softmax is at least float32. With `mutable=["intermediates"]` the module sows its maps, f32[b, heads, m, n], as
    `attention`.
    """
    if module.is_mutable_collection("intermediates"):
        maps = _maps(q, k)
        module.sow("intermediates", "attention", maps)
        return jnp.einsum("bhqk,bkhd->bqhd", maps.astype(v.dtype), v)
    if not _can_use_cudnn(q, k):
        return _attend(q, k, v)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own implementation relies on it
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


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


def _can_use_cudnn(q: jax.Array, k: jax.Array) -> bool:
    """Whether cuDNN's fused attention applies: Ampere or newer, self-attention, 16 bits, at most 128 features a head.

    Programs compiled for absent GPUs have an unknown compute capability (0) and use the XLA form.
    """
    if q.shape != k.shape or platform.current() != "gpu" or platform.compute_capability() < 8.0:
        return False
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128

"""Multi-head attention, by cuDNN where it can, else in plain XLA operations, and rotary position embeddings."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

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


@functools.lru_cache(maxsize=16)  # the same arrays in all blocks, so that a program holds them once
def _cos_sin(rope: Rope, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the angle of each pair of a head, f64[patches, 1, pairs]."""
    sides, base = (rope.rows, rope.columns), 100.0 if rope.kind == "dinov3" else 10_000.0
    axes = [2 * np.pi * ((2 * np.arange(n) + 1) / n - 1) if base == 100 else np.arange(n) * 16 / n for n in sides]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 1, 2, 1)
    angles = (grid * base ** -np.linspace(0, 1, pairs // 2, endpoint=False)).reshape(len(grid), 1, pairs)
    return np.cos(angles), np.sin(angles)


def attention(
    qkv: jax.Array, heads: int, with_maps: bool = False, rope: Rope | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Multi-head self-attention (Vaswani et al. 2017, arXiv:1706.03762): qkv [b, n, 3 * d] → ([b, n, d], maps).

    The last axis of `qkv` holds queries, keys and values in turn, each [heads, d / heads]; `rope` rotates the first
    two. The maps are those of `attend`.
    """
    b, n, width = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, heads, -1), 2, 0)  # [b, n, heads, d / heads]
    if rope is not None:
        q, k = rope.rotate(q), rope.rotate(k)
    y, maps = attend(q, k, v, with_maps)
    return y.reshape(b, n, width // 3), maps


def attend(q: jax.Array, k: jax.Array, v: jax.Array, with_maps: bool = False) -> tuple[jax.Array, jax.Array | None]:
    """Attention of q [b, m, heads, d] over k and v [b, n, heads, d]: ([b, m, heads, d], maps).

    The softmax is at least float32. The maps are f32[b, heads, m, n], or None without `with_maps`.
    """
    if with_maps:
        maps = _maps(q, k)
        return jnp.einsum("bhqk,bkhd->bqhd", maps.astype(v.dtype), v), maps
    if not _can_use_cudnn(q, k):
        return _attend(q, k, v), None
    with jax.numpy_dtype_promotion("standard"):  # JAX's own implementation relies on it
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn"), None


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

"""The Vision Transformer and the MLP-Mixer."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.typing import Arguments, ModuleDef
from imgclf_jax.models import parts
from imgclf_jax.models.attention import attention
from imgclf_jax.models.layers import Conv, Dense, drop_path, gelu, mean_pool, spread
from imgclf_jax.models.norms import LayerNorm

_VIT = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}  # width, layers, heads
_MIXER = {"S": (512, 8, 256, 2048), "B": (768, 12, 384, 3072)}  # width, layers, hidden widths over tokens, channels
_init = nn.initializers.normal(0.02)


def _patches(x: jax.Array, patch: int, width: int, dtype: DTypeLike, kind: str) -> jax.Array:
    """Patch embedding: [b, h, w, c] → [b, h / patch, w / patch, width]."""
    h, w = x.shape[1:3]
    if h % patch or w % patch:
        raise UserError(f"{kind}: images of {h} by {w} do not divide into patches of {patch}; resize them")
    return Conv(width, patch, patch, "VALID", dtype=dtype, kernel_init=nn.initializers.lecun_normal(), name="patch")(x)


def sincos_positions(h: int, w: int, width: int) -> np.ndarray:
    """Fixed 2D sine-cosine position embeddings f32[h * w, width], as in Beyer et al. 2022 (arXiv:2205.01580).

    `width` must be a multiple of 4.
    """
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    frequencies = 1 / 10_000 ** (np.arange(width // 4) / max(width // 4 - 1, 1))
    angles = [positions.reshape(-1, 1) * frequencies for positions in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


class Attention(nn.Module):
    """Multi-head self-attention over tokens [b, n, d] (Vaswani et al. 2017, arXiv:1706.03762).

    With `mutable=["intermediates"]` it sows its maps, f32[b, heads, queries, keys], as `attention`.
    """

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        qkv_init = nn.initializers.variance_scaling(2.0, "fan_avg", "uniform")  # Glorot for each of the three kernels
        qkv = Dense(3 * d, self.dtype, qkv_init, name="qkv")(x)  # [b, n, 3 * d]
        y, maps = attention(qkv, self.heads, self.is_mutable_collection("intermediates"))
        if maps is not None:
            self.sow("intermediates", "attention", maps)
        return Dense(d, self.dtype, nn.initializers.xavier_uniform(), name="proj")(y)


class MLPBlock(nn.Module):
    """The MLP of a block, [b, n, d] → [b, n, hidden] → [b, n, d], with GELU and dropout in between."""

    hidden: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        init = nn.initializers.xavier_uniform()
        y = self.activation(Dense(self.hidden, self.dtype, init, name="fc1")(x))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return Dense(x.shape[-1], self.dtype, init, name="fc2")(y)


class EncoderBlock(nn.Module):
    """A pre-norm transformer block: attention and an MLP, each with a residual connection."""

    heads: int
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32
    norm: ModuleDef = LayerNorm
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = parts.norms(self.norm, dtype=self.dtype)
        y = Attention(self.heads, self.dtype, name="attn")(norm("norm1")(x, train))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        x = x + drop_path(self, y, self.drop_path, train)
        mlp = MLPBlock(4 * x.shape[-1], self.dropout, self.dtype, self.activation, name="mlp")
        y = mlp(norm("norm2")(x, train), train)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return x + drop_path(self, y, self.drop_path, train)


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929): [b, h, w, c] → [b, width].

    - `variant` is "Ti", "S", "B" or "L", of width 192, 384, 768 or 1024; `patch` is the side of a patch in pixels.
    - `positions` are "learned" or "sincos".
    - `pool` is "cls" (the class token) or "mean" (over all tokens).
    - `representation` adds a dense layer of the same width with tanh, as in the paper's pre-training.
    """

    variant: str = "S"
    patch: int = 16
    positions: str = "learned"
    pool: str = "cls"
    representation: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    remat: str = ""
    dtype: DTypeLike = jnp.float32
    block: ModuleDef = EncoderBlock
    norm: ModuleDef = LayerNorm
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        choices = {"variant": [*_VIT], "positions": ["learned", "sincos"], "pool": ["cls", "mean"]}
        for kind, allowed in choices.items():
            if (value := getattr(self, kind)) not in allowed:
                raise UserError(unknown(f"vit {kind}", value, allowed))
        width, layers, heads = _VIT[self.variant]
        x = _patches(x, self.patch, width, self.dtype, "vit")
        b, h, w, _ = x.shape
        x = x.reshape(b, h * w, width)
        if self.positions == "sincos":
            x = x + jnp.asarray(sincos_positions(h, w, width), self.dtype)
        if self.pool == "cls":
            token = self.param("cls", nn.initializers.zeros, (1, 1, width))
            x = jnp.concatenate([spread(token, x[:, :1]), x], 1)
        if self.positions == "learned":
            x = x + spread(self.param("positions_embedding", _init, (1, x.shape[1], width)), x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block, norm = parts.remat(self.block, self.remat), parts.norms(self.norm, dtype=self.dtype)
        passed: Arguments = {
            "heads": heads, "dropout": self.dropout, "dtype": self.dtype, "norm": norm, "activation": self.activation,
        }  # fmt: skip
        for i in range(layers):
            x = block(drop_path=self.drop_path * i / (layers - 1), **passed, name=f"block{i}")(x, train)
        if self.pool == "cls":
            x = x[:, :1]  # before the norm, which no other token needs
        x = mean_pool(norm("norm")(x, train))
        return jnp.tanh(Dense(width, self.dtype, name="representation")(x)) if self.representation else x


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing: an MLP over each, with a residual connection."""

    tokens_hidden: int
    channels_hidden: int
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32
    norm: ModuleDef = LayerNorm
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = parts.norms(self.norm, dtype=self.dtype)
        mlp = partial(MLPBlock, activation=self.activation, dtype=self.dtype)
        y = norm("norm1")(x, train).swapaxes(1, 2)  # [b, d, n]
        y = mlp(self.tokens_hidden, name="mlp_tokens")(y, train).swapaxes(1, 2)
        x = x + drop_path(self, y, self.drop_path, train)
        y = mlp(self.channels_hidden, name="mlp_channels")(norm("norm2")(x, train), train)
        return x + drop_path(self, y, self.drop_path, train)


class Mixer(nn.Module):
    """MLP-Mixer "S" or "B" (Tolstikhin et al. 2021, arXiv:2105.01601): [b, h, w, c] → [b, 512] or [b, 768]."""

    variant: str = "S"
    patch: int = 16
    drop_path: float = 0.0
    remat: str = ""
    dtype: DTypeLike = jnp.float32
    block: ModuleDef = MixerBlock
    norm: ModuleDef = LayerNorm
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.variant not in _MIXER:
            raise UserError(unknown("mixer variant", self.variant, _MIXER))
        width, layers, tokens_hidden, channels_hidden = _MIXER[self.variant]
        x = _patches(x, self.patch, width, self.dtype, "mixer")
        x = x.reshape(x.shape[0], -1, width)
        block, norm = parts.remat(self.block, self.remat), parts.norms(self.norm, dtype=self.dtype)
        passed: Arguments = {
            "tokens_hidden": tokens_hidden, "channels_hidden": channels_hidden, "dtype": self.dtype, "norm": norm,
            "activation": self.activation,
        }  # fmt: skip
        for i in range(layers):
            x = block(drop_path=self.drop_path * i / (layers - 1), **passed, name=f"block{i}")(x, train)
        return mean_pool(norm("norm")(x, train))

"""The Vision Transformer and the MLP-Mixer."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core.errors import UserError, check_choice
from imgclf_jax.core.typing import Arguments, ModuleDef
from imgclf_jax.models import parts
from imgclf_jax.models.attention import ROPES, Rope, attend
from imgclf_jax.models.layers import Conv, Dense, add_bias, drop_path, gelu, mean_pool, spread
from imgclf_jax.models.norms import LayerNorm

_VIT = {  # width, layers, heads
    "Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "wee": (256, 14, 4),
    "little": (320, 14, 5), "medium": (512, 12, 8), "mediumd": (512, 20, 8), "betwixt": (640, 12, 10),  # timm's
}  # fmt: skip
_MIXER = {"S": (512, 8, 256, 2048), "B": (768, 12, 384, 3072)}  # width, layers, hidden widths over tokens, channels
_init = nn.initializers.normal(0.02)


def _patches(x: jax.Array, patch: int, width: int, dtype: DTypeLike, kind: str, bias: bool = True) -> jax.Array:
    """Patch embedding: [b, h, w, c] → [b, h / patch, w / patch, width]."""
    h, w = x.shape[1:3]
    if h % patch or w % patch:
        raise UserError(f"{kind}: images of {h} by {w} do not divide into patches of {patch}; resize them")
    init = nn.initializers.lecun_normal()
    return Conv(width, patch, patch, "VALID", use_bias=bias, dtype=dtype, kernel_init=init, name="patch")(x)


def sincos_positions(h: int, w: int, width: int) -> np.ndarray:
    """Fixed 2D sine-cosine position embeddings f32[h * w, width], as in Beyer et al. 2022 (arXiv:2205.01580).

    `width` must be a multiple of 4.
    """
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    frequencies = 1 / 10_000 ** (np.arange(width // 4) / max(width // 4 - 1, 1))
    angles = [positions.reshape(-1, 1) * frequencies for positions in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


class Attention(nn.Module):
    """Multi-head self-attention over tokens [b, n, d].

    `bias` are the parts that have one: "qkv", "qv" or "". They are three layers unless `fused`.
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    rope: Rope | None = None
    bias: str = "qkv"
    fused: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, n, d = x.shape
        glorot = nn.initializers.xavier_uniform()
        if not self.fused:
            three = [Dense(d, self.dtype, glorot, part in self.bias, name=f"{part}_proj")(x) for part in "qkv"]
            qkv = jnp.concatenate(three, -1)  # [b, n, 3 * d]
        else:
            init = nn.initializers.variance_scaling(2.0, "fan_avg", "uniform")  # Glorot for each of the three kernels
            qkv = Dense(3 * d, self.dtype, init, self.bias == "qkv", name="qkv")(x)
            if self.bias == "qv":
                q, v = (self.param(name, nn.initializers.zeros, (d,)) for name in ("q_bias", "v_bias"))
                qkv = add_bias(qkv, jnp.concatenate([q, jnp.zeros_like(q), v])).astype(self.dtype)
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, -1), 2, 0)  # [b, n, heads, d / heads]
        if self.rope is not None:
            q, k = self.rope.rotate(q), self.rope.rotate(k)
        return Dense(d, self.dtype, glorot, name="proj")(attend(self, q, k, v).reshape(x.shape))


class MLPBlock(nn.Module):
    """The MLP of a block, [b, n, d] → [b, n, hidden] → [b, n, d], with GELU, dropout and a `norm` in between.

    `kind` is "mlp", or "swiglu" (Shazeer 2020, arXiv:2002.05202): a second layer, multiplied by SiLU of the first.
    "swiglu_packed" has both in one matrix.
    """

    hidden: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    activation: Callable[[jax.Array], jax.Array] = gelu
    kind: str = "mlp"
    norm: parts.Norm | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        init = nn.initializers.xavier_uniform()
        if self.kind == "mlp":
            y = self.activation(Dense(self.hidden, self.dtype, init, name="fc1")(x))
        else:
            layers = {"fc1": 2} if self.kind == "swiglu_packed" else {"fc1_g": 1, "fc1_x": 1}
            both = [Dense(k * self.hidden, self.dtype, init, name=name)(x) for name, k in layers.items()]
            gate, y = both if both[1:] else jnp.split(both[0], 2, -1)
            y = nn.silu(gate) * y
        if self.norm is not None:
            y = self.norm("norm")(y, train)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return Dense(x.shape[-1], self.dtype, init, name="fc2")(y)


class EncoderBlock(nn.Module):
    """A pre-norm transformer block: attention and an MLP, each with a residual connection. The options are ViT's."""

    heads: int
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32
    norm: ModuleDef = LayerNorm
    activation: Callable[[jax.Array], jax.Array] = gelu
    rope: Rope | None = None
    layer_scale: float = 0.0
    qkv_bias: str = "qkv"
    qkv_fused: bool = True
    mlp: str = "mlp"
    mlp_ratio: float = 4.0
    mlp_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm, d = parts.norms(self.norm, dtype=self.dtype), x.shape[-1]
        attn = Attention(self.heads, self.dtype, self.rope, self.qkv_bias, self.qkv_fused, name="attn")
        mlp = MLPBlock(int(self.mlp_ratio * d), self.dropout, self.dtype, self.activation, self.mlp,
                       norm if self.mlp_norm else None, name="mlp")  # fmt: skip
        for i, layer in ((1, attn), (2, partial(mlp, train=train))):
            y = nn.Dropout(self.dropout, deterministic=not train)(layer(norm(f"norm{i}")(x, train)))
            if self.layer_scale:
                y = y * spread(self.param(f"ls{i}_gamma", nn.initializers.constant(self.layer_scale), (d,)), y)
            x = x + drop_path(self, y, self.drop_path, train)
        return x


class AttentionPool(nn.Module):
    """One learned query attends to tokens [b, n, d], then an MLP: → [b, d] (Zhai et al. 2022, arXiv:2106.04560)."""

    heads: int
    hidden: int
    dtype: DTypeLike = jnp.float32
    norm: ModuleDef = LayerNorm
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        b, n, d = x.shape
        init = nn.initializers.xavier_uniform()
        latent = jnp.broadcast_to(self.param("latent", init, (1, 1, d)), (b, 1, d))
        q = Dense(d, self.dtype, init, name="q")(latent).reshape(b, 1, self.heads, -1)
        kv = Dense(2 * d, self.dtype, init, name="kv")(x).reshape(b, n, 2, self.heads, -1)
        y = attend(self, q, kv[:, :, 0], kv[:, :, 1]).reshape(b, 1, d)
        y = Dense(d, self.dtype, init, name="proj")(y)
        normed = parts.norms(self.norm, dtype=self.dtype)("norm")(y, train)
        return (y + MLPBlock(self.hidden, 0.0, self.dtype, self.activation, name="mlp")(normed, train))[:, 0]


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929): [b, h, w, c] → [b, width].

    - `variant` is a key of `_VIT`, such as "Ti", "S", "B" or "L"; `patch` is the side of a patch in pixels.
    - `positions` are "learned" (of all tokens), "patches" (learned, of these alone), "sincos" or "none"; `rope`,
      "dinov3" or "eva02", rotates queries and keys: see Rope.
    - `pool` is "cls" (the class token), "mean" (over the patches), "cls+mean" (both, [b, 2 * width]) or "map" (see
      AttentionPool). With `fc_norm` the last norm is that of the mean.
    - `class_token` adds one although `pool` does not read it; `registers` counts further tokens (arXiv:2309.16588).
    - `representation` adds a dense layer of the same width with tanh, as in the paper's pre-training.
    - `layer_scale` is the initial value of LayerScale (Touvron et al. 2021, arXiv:2103.17239); 0 leaves it out.
    - `pre_norm` adds a norm before the blocks, and leaves out the bias of the patches, as in CLIP.
    - `qkv_bias` and `qkv_fused` are `bias` and `fused` of Attention; `mlp`, `mlp_ratio` and `mlp_norm` are `kind`,
      `hidden` over the width, and `norm` of MLPBlock.
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
    class_token: bool = False
    registers: int = 0
    rope: str = ""
    layer_scale: float = 0.0
    pre_norm: bool = False
    fc_norm: bool = False
    qkv_bias: str = "qkv"
    qkv_fused: bool = True
    mlp: str = "mlp"
    mlp_ratio: float = 4.0
    mlp_norm: bool = False

    @property
    def prefix(self) -> int:
        """The number of tokens before the patches."""
        return int(self.class_token or "cls" in self.pool) + self.registers

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        self._check()
        width, layers, heads = _VIT[self.variant]
        x = _patches(x, self.patch, width, self.dtype, "vit", not self.pre_norm)
        b, h, w, _ = x.shape
        x = x.reshape(b, h * w, width)
        if self.positions == "sincos":
            x = x + jnp.asarray(sincos_positions(h, w, width), self.dtype)
        elif self.positions == "patches":
            x = x + spread(self.param("positions_embedding", _init, (1, h * w, width)), x)
        for name, init, n in (("registers", _init, self.registers),
                              ("cls", nn.initializers.zeros, self.prefix - self.registers)):  # fmt: skip
            if n:
                token = jnp.broadcast_to(self.param(name, init, (1, n, width)), (b, n, width))
                x = jnp.concatenate([token.astype(x.dtype), x], 1)
        if self.positions == "learned":
            x = x + spread(self.param("positions_embedding", _init, (1, x.shape[1], width)), x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        norm = parts.norms(self.norm, dtype=self.dtype)
        if self.pre_norm:
            x = norm("norm_pre")(x, train)
        passed: Arguments = {"rope": Rope(self.rope, h, w)} if self.rope else {}
        for key in ("layer_scale", "qkv_bias", "qkv_fused", "mlp", "mlp_ratio", "mlp_norm"):
            if (value := getattr(self, key)) != type(self).__dataclass_fields__[key].default:  # others need no field
                passed[key] = value
        block = parts.block_of(self, norm, heads=heads, dropout=self.dropout, **passed)
        for i in range(layers):
            x = block(drop_path=self.drop_path * i / (layers - 1), name=f"block{i}")(x, train)
        x = self._pool(x, norm, heads, train)
        return jnp.tanh(Dense(width, self.dtype, name="representation")(x)) if self.representation else x

    def _check(self) -> None:
        choices = {
            "variant": [*_VIT], "positions": ["learned", "patches", "sincos", "none"], "rope": ["", *ROPES],
            "pool": ["cls", "mean", "cls+mean", "map"], "qkv_bias": ["qkv", "qv", ""],
            "mlp": ["mlp", "swiglu", "swiglu_packed"],
        }  # fmt: skip
        for kind, allowed in choices.items():
            check_choice(f"vit {kind}", getattr(self, kind), allowed)
        for name, other, found in (
            ("class_token", "pool", self.class_token and "cls" in self.pool),
            ("fc_norm", "pool", self.fc_norm and self.pool != "mean"),
            ("activation", "mlp", self.mlp != "mlp" and self.activation is not gelu),
        ):
            if found:
                raise UserError(f"vit: {name} has no effect with {other}={getattr(self, other)!r}; leave it out")

    def _pool(self, x: jax.Array, norm: parts.Norm, heads: int, train: bool) -> jax.Array:
        """Tokens [b, n, width] → features [b, width], or [b, 2 * width] for "cls+mean"."""
        if self.pool == "mean" and self.prefix:
            x = x[:, self.prefix :]
        if self.fc_norm:
            return norm("fc_norm")(mean_pool(x), train)
        x = norm("norm")(x[:, :1] if self.pool == "cls" else x, train)  # no other token needs it
        if self.pool in ("cls", "mean"):
            return mean_pool(x)
        if self.pool == "cls+mean":
            return jnp.concatenate([x[:, 0], mean_pool(x[:, self.prefix :])], -1)
        hidden = int(self.mlp_ratio * x.shape[-1])
        return AttentionPool(heads, hidden, self.dtype, norm, self.activation, name="attn_pool")(x, train)


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
        check_choice("mixer variant", self.variant, _MIXER)
        width, layers, tokens_hidden, channels_hidden = _MIXER[self.variant]
        x = _patches(x, self.patch, width, self.dtype, "mixer")
        x = x.reshape(x.shape[0], -1, width)
        norm = parts.norms(self.norm, dtype=self.dtype)
        block = parts.block_of(self, norm, tokens_hidden=tokens_hidden, channels_hidden=channels_hidden)
        for i in range(layers):
            x = block(drop_path=self.drop_path * i / (layers - 1), name=f"block{i}")(x, train)
        return mean_pool(norm("norm")(x, train))

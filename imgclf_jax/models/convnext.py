"""ConvNeXt: Liu et al. 2022 (arXiv:2201.03545); V2: Woo et al. 2023 (arXiv:2301.00808)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core import dtypes
from imgclf_jax.core.errors import UserError, check_choice
from imgclf_jax.core.typing import Arguments, ModuleDef
from imgclf_jax.models import parts
from imgclf_jax.models.layers import Conv, Dense, drop_path, gelu, mean_pool, spread
from imgclf_jax.models.norms import LayerNorm

_VARIANTS = {
    "T": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "S": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "B": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    **{f"V2-{size}": (depths, (d, 2 * d, 4 * d, 8 * d)) for depths, sizes in (
           ((2, 2, 6, 2), (("Atto", 40), ("Femto", 48), ("Pico", 64))), ((2, 2, 8, 2), (("Nano", 80),)),
           ((3, 3, 9, 3), (("T", 96),)), ((3, 3, 27, 3), (("B", 128), ("L", 192)))) for size, d in sizes},
}  # fmt: skip
_init = nn.initializers.normal(0.02)


class GRN(nn.Module):
    """Global response normalization (V2, equations 1 to 3): x + bias + scale · x · r for x [b, h, w, c].

    r [b, c] is the channel's L2 norm over the pixels, divided by the mean over the channels.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = (self.param(name, nn.initializers.zeros, (x.shape[-1],)) for name in ("scale", "bias"))
        x = dtypes.upcast(x)
        square = jnp.sum(jnp.square(x), (1, 2), keepdims=True)
        norm = jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))  # whose derivative at 0 is 0
        r = norm / (jnp.mean(norm, -1, keepdims=True) + 1e-6)
        return (x + spread(bias, x) + spread(scale, x) * (x * r)).astype(self.dtype)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7 convolution, then a pointwise MLP, with layer scale, or in V2 `grn`, and a residual connection.

    With `as_conv` the layers of the MLP are 1×1 convolutions, as in the published files of small networks.
    """

    drop_path: float = 0.0
    layer_scale: float = 1e-6
    dtype: DTypeLike = jnp.float32
    norm: ModuleDef = LayerNorm
    activation: Callable[[jax.Array], jax.Array] = gelu
    grn: bool = False
    as_conv: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        d = x.shape[-1]
        settings: Arguments = {"dtype": self.dtype, "kernel_init": _init}
        y = Conv(d, 7, padding=3, feature_group_count=d, **settings, name="dwconv")(x)
        y = parts.norms(self.norm, dtype=self.dtype)("norm")(y, train)
        layer: ModuleDef = partial(Conv, kernel_size=1) if self.as_conv else Dense
        y = self.activation(layer(features=4 * d, **settings, name="pwconv1")(y))
        y = GRN(self.dtype, name="grn")(y) if self.grn else y
        y = layer(features=d, **settings, name="pwconv2")(y)
        if not self.grn:
            y *= spread(self.param("gamma", nn.initializers.constant(self.layer_scale), (d,)), y)
        return x + drop_path(self, y, self.drop_path, train)


class ConvNeXt(nn.Module):
    """ConvNeXt "T", "S" or "B": [b, h, w, c] → [b, 768], or [b, 1024] for "B"; "V2-Atto" to "V2-L" → [b, 320 to 1536].

    `drop_path` is the stochastic-depth rate of the last block; the rates grow linearly from 0 in the first.
    """

    variant: str = "T"
    drop_path: float = 0.0
    layer_scale: float = 1e-6
    remat: str = ""
    dtype: DTypeLike = jnp.float32
    block: ModuleDef = ConvNeXtBlock
    norm: ModuleDef = LayerNorm
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        check_choice("convnext variant", self.variant, _VARIANTS)
        depths, dims = _VARIANTS[self.variant]
        h, w = x.shape[1:3]
        if min(h, w) < 32:  # one pixel after the stem and the downsamplings
            raise UserError(f"convnext: images of {h} by {w} are too small; resize them to 32 by 32 or more")
        v2 = self.variant.startswith("V2")
        if v2 and self.layer_scale != type(self).layer_scale:
            raise UserError(f"convnext({self.variant!r}): V2 has no layer scale; leave layer_scale out")
        settings: Arguments = {"dtype": self.dtype, "kernel_init": _init}
        rates = iter(self.drop_path * i / (sum(depths) - 1) for i in range(sum(depths)))
        norm, of_v2 = parts.norms(self.norm, dtype=self.dtype), {"grn": True, "as_conv": dims[0] < 96}
        block = parts.block_of(self, norm, layer_scale=self.layer_scale, **(of_v2 if v2 else {}))
        for i, (depth, d) in enumerate(zip(depths, dims, strict=True)):
            if i:
                x = norm(f"downsample{i}_norm")(x, train)
            size = 2 if i else 4
            x = Conv(d, size, size, "VALID", **settings, name=f"downsample{i}_conv" if i else "stem_conv")(x)
            if not i:
                x = norm("stem_norm")(x, train)  # [b, h/4, w/4, d]
            for j in range(depth):
                x = block(drop_path=next(rates), name=f"stage{i}_{j}")(x, train)
        return norm("norm")(mean_pool(x), train)

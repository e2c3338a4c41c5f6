"""ConvNeXt: Liu et al. 2022 (arXiv:2201.03545)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.typing import Arguments, ModuleDef
from imgclf_jax.models import parts
from imgclf_jax.models.layers import Conv, Dense, drop_path, gelu, mean_pool, spread
from imgclf_jax.models.norms import LayerNorm

_VARIANTS = {
    "T": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "S": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "B": ((3, 3, 27, 3), (128, 256, 512, 1024)),
}
_init = nn.initializers.normal(0.02)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7 convolution, then a pointwise MLP, with layer scale and a residual connection."""

    drop_path: float = 0.0
    layer_scale: float = 1e-6
    dtype: DTypeLike = jnp.float32
    norm: ModuleDef = LayerNorm
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        d = x.shape[-1]
        settings: Arguments = {"dtype": self.dtype, "kernel_init": _init}
        y = Conv(d, 7, padding=3, feature_group_count=d, **settings, name="dwconv")(x)
        y = parts.norms(self.norm, dtype=self.dtype)("norm")(y, train)
        y = self.activation(Dense(4 * d, **settings, name="pwconv1")(y))
        y = Dense(d, **settings, name="pwconv2")(y)
        gamma = self.param("gamma", nn.initializers.constant(self.layer_scale), (d,))
        return x + drop_path(self, y * spread(gamma, y), self.drop_path, train)


class ConvNeXt(nn.Module):
    """ConvNeXt "T", "S" or "B": [b, h, w, c] → [b, 768], or [b, 1024] for "B".

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
        if self.variant not in _VARIANTS:
            raise UserError(unknown("convnext variant", self.variant, _VARIANTS))
        depths, dims = _VARIANTS[self.variant]
        h, w = x.shape[1:3]
        if min(h, w) < 32:  # one pixel after the stem and the downsamplings
            raise UserError(f"convnext: images of {h} by {w} are too small; resize them to 32 by 32 or more")
        settings: Arguments = {"dtype": self.dtype, "kernel_init": _init}
        rates = iter(self.drop_path * i / (sum(depths) - 1) for i in range(sum(depths)))
        block, norm = parts.remat(self.block, self.remat), parts.norms(self.norm, dtype=self.dtype)
        passed: Arguments = {"norm": norm, "activation": self.activation, "dtype": self.dtype}
        for i, (depth, d) in enumerate(zip(depths, dims, strict=True)):
            if i:
                x = norm(f"downsample{i}_norm")(x, train)
            size = 2 if i else 4
            x = Conv(d, size, size, "VALID", **settings, name=f"downsample{i}_conv" if i else "stem_conv")(x)
            if not i:
                x = norm("stem_norm")(x, train)  # [b, h/4, w/4, d]
            for j in range(depth):
                x = block(drop_path=next(rates), layer_scale=self.layer_scale, **passed, name=f"stage{i}_{j}")(x, train)
        return norm("norm")(mean_pool(x), train)

"""RegNetY: Radosavovic et al. 2020 (arXiv:2003.13678)."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core.errors import check_choice
from imgclf_jax.core.typing import ModuleDef
from imgclf_jax.models import parts
from imgclf_jax.models.layers import he_conv, mean_pool
from imgclf_jax.models.norms import BatchNorm
from imgclf_jax.models.resnet import Bottleneck

_VARIANTS = {  # by multiply-adds: (initial width, slope, multiplier, width of a group, depth)
    "200MF": (24, 36.44, 2.49, 8, 13), "400MF": (48, 27.89, 2.09, 8, 16), "600MF": (48, 32.54, 2.32, 16, 15),
    "800MF": (56, 38.84, 2.4, 16, 14), "1.6GF": (48, 20.71, 2.65, 24, 27), "3.2GF": (80, 42.63, 2.66, 24, 21),
    "4GF": (96, 31.41, 2.24, 64, 22), "6.4GF": (112, 33.22, 2.27, 72, 25), "8GF": (192, 76.82, 2.19, 56, 17),
    "12GF": (168, 73.36, 2.37, 112, 19), "16GF": (200, 106.23, 2.48, 112, 18), "32GF": (232, 115.89, 2.53, 232, 20),
}  # fmt: skip


def _stages(initial: int, slope: float, multiplier: float, group: int, depth: int) -> Iterator[tuple[int, int, int]]:
    """Yields (width, groups, blocks) of each stage: equations 2 to 4, with widths that are multiples of 8."""
    exponents = np.round(np.log1p(slope * np.arange(depth) / initial) / np.log(multiplier))
    widths = np.round(initial * multiplier**exponents / 8).astype(int) * 8
    for width, blocks in zip(*np.unique(widths, return_counts=True), strict=True):
        groups = round(width / min(group, width))
        yield groups * min(group, int(width)), groups, int(blocks)


class RegNetY(nn.Module):
    """RegNetY "200MF" to "32GF": [b, h, w, c] → [b, width of the last stage]."""

    variant: str = "4GF"
    remat: str = ""
    dtype: DTypeLike = jnp.float32
    block: ModuleDef = Bottleneck
    norm: ModuleDef = BatchNorm
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        check_choice("regnety variant", self.variant, _VARIANTS)
        norm = parts.norms(self.norm, momentum=0.9, dtype=self.dtype)
        block = parts.block_of(self, norm, expansion=1, squeeze=True, last_scale=1.0)
        x = self.activation(norm("stem_bn")(he_conv(32, 3, 2, self.dtype, "stem_conv")(x), train))
        for i, (width, groups, blocks) in enumerate(_stages(*_VARIANTS[self.variant]), 1):
            for j in range(1, blocks + 1):
                x = block(features=width, groups=groups, strides=2 if j == 1 else 1, name=f"stage{i}_{j}")(x, train)
        return mean_pool(x)

"""A network with batch statistics and no kinks: near zero, rounding decides whether a ReLU has a gradient."""

import jax
from flax import linen as nn

from imgclf_jax.models.layers import Conv, mean_pool
from imgclf_jax.models.norms import BatchNorm


class Smooth(nn.Module):
    """Blocks of convolution, batch norm and tanh: [b, h, w, c] → [b, d]."""

    widths: tuple[int, ...] = (8, 16)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i, width in enumerate(self.widths):
            x = Conv(width, 3, strides=2, use_bias=False, name=f"conv{i}")(x)
            x = nn.tanh(BatchNorm(name=f"norm{i}")(x, train))
        return mean_pool(x)

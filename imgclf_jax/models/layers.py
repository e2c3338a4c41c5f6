"""Layers that models share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def max_pool(x: jax.Array, window: int) -> jax.Array:
    """Max-pooling over windows that do not overlap, [b, h, w, c] → [b, h // window, w // window, c].

    The same as `nn.max_pool(x, (window, window), (window, window), "VALID")`, as a maximum over strided slices: on
    CPU its gradient is about ten times faster than that of XLA's `select_and_scatter`. Where several elements share
    the maximum the gradient is split among them; `select_and_scatter` gives it all to the first.
    """
    h, w = x.shape[1] // window * window, x.shape[2] // window * window
    slices = [x[:, i:h:window, j:w:window] for i in range(window) for j in range(window)]
    out = slices[0]
    for piece in slices[1:]:
        out = jnp.maximum(out, piece)
    return out


class ConvPool(nn.Module):
    """Convolution (3×3, "VALID"), bias, ReLU, 2×2 max-pool, computed as convolution, max-pool, bias, ReLU.

    Adding a constant and ReLU are monotonic, so they commute with the maximum: the same numbers, and the gradient
    too, with a quarter of the element-wise work.
    """

    features: int
    kernel: int = 3
    pool: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Keras's defaults: Glorot-uniform kernels and zero biases.
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.glorot_uniform(),
            name="conv",
        )(x)  # [b, h - kernel + 1, w - kernel + 1, features]
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return nn.relu(max_pool(x, self.pool) + bias.astype(x.dtype))

"""SqueezeNet 1.1: Iandola et al. 2016 (arXiv:1602.07360), with the authors' later, faster stages."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Arguments, ModuleDef
from imgclf_jax.models.layers import Conv, max_pool, mean_pool

_he_uniform = nn.initializers.he_uniform()
_SQUEEZED = (16, 16, 32, 32, 48, 48, 64, 64)  # channels of fire2 to fire9, which expand to eight times as many


class Fire(nn.Module):
    """A 1×1 convolution to `squeeze` channels, then a 1×1 and a 3×3 one, side by side, to four times as many each."""

    squeeze: int
    dtype: DTypeLike = jnp.float32
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        settings: Arguments = {"dtype": self.dtype, "kernel_init": _he_uniform}
        x = self.activation(Conv(self.squeeze, 1, **settings, name="squeeze")(x))
        expand = (Conv(4 * self.squeeze, k, padding=k // 2, **settings, name=f"expand{k}x{k}") for k in (1, 3))
        return jnp.concatenate([self.activation(layer(x)) for layer in expand], -1)


class SqueezeNet(nn.Module):
    """A convolution and eight fire modules: [b, h, w, c] → [b, 512].

    The published network applies the head to each pixel and averages the activated logits; so does a Classifier.
    """

    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    block: ModuleDef = Fire
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    applies_head = True

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, head: Callable[[jax.Array], jax.Array] | None = None
    ) -> jax.Array:
        """Returns the features, or with `head`, a layer over the last axis, logits."""
        h, w = x.shape[1:3]
        if min(h, w) < 17:
            raise UserError(f"squeezenet: images of {h} by {w} are too small; resize them to 17 by 17 or more")
        x = self.activation(Conv(64, 3, 2, "VALID", dtype=self.dtype, kernel_init=_he_uniform, name="conv1")(x))
        for n, squeeze in enumerate(_SQUEEZED, 2):
            if n in (2, 4, 6):  # the last windows may reach one pixel over the edge
                over = [(0, 1 - side % 2) for side in x.shape[1:3]]
                x = max_pool(jnp.pad(x, ((0, 0), *over, (0, 0)), "edge"), 3, 2)
            x = self.block(squeeze=squeeze, activation=self.activation, dtype=self.dtype, name=f"fire{n}")(x, train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return mean_pool(x if head is None else self.activation(head(x)))

"""The network of airbench94, the CIFAR-10 speed record of its time: Jordan 2024 (arXiv:2404.00498)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from imgclf_jax.models import parts
from imgclf_jax.models.layers import Conv, gelu, max_pool
from imgclf_jax.models.norms import BatchNorm

_IN_GROUP = {"norm": parts.NORM, "activation": parts.ACTIVATION}
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default


def _dirac(key: jax.Array, shape: tuple[int, int, int, int], dtype: Any = jnp.float32) -> jax.Array:
    """[kh, kw, c, f] with f ≥ c: the first c outputs are the inputs, the others are drawn."""
    kh, kw, c, _ = shape
    kernel = _uniform(key, shape, dtype).at[..., :c].set(0)
    return kernel.at[kh // 2, kw // 2, jnp.arange(c), jnp.arange(c)].set(1)


class ConvGroup(nn.Module):
    """Two 3×3 convolutions without bias, the first followed by a max-pool; batch norm without scale, and GELU."""

    features: int
    dtype: Any = jnp.float32
    norm: Any = BatchNorm
    activation: Callable[[jax.Array], jax.Array] = gelu
    swappable = _IN_GROUP

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        settings: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "kernel_init": _dirac}
        norm = parts.norms(self.norm, dtype=self.dtype)
        x = max_pool(Conv(self.features, 3, **settings, name="conv1")(x), 2, 2)
        x = self.activation(norm("norm1")(x, train))
        x = Conv(self.features, 3, **settings, name="conv2")(x)
        return self.activation(norm("norm2")(x, train))


_IN_AIRBENCH = {
    "block": parts.Part({"conv_group": ConvGroup}, ("features", "norm", "activation", "dtype"), ("features",)),
    **_IN_GROUP,
}


class AirBench(nn.Module):
    """Whitening 2×2 convolution, three groups, max-pool: [b, h, w, c] → [b, widths[-1] · …], 256 from 32×32 pixels.

    The whitening kernel is not trained; `init_on_images` sets it. `scale` multiplies the features, and so the logits.
    """

    widths: tuple[int, ...] = (64, 256, 256)
    scale: float = 1 / 9
    dtype: Any = jnp.float32
    block: Any = ConvGroup
    norm: Any = BatchNorm
    activation: Callable[[jax.Array], jax.Array] = gelu
    swappable = _IN_AIRBENCH

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        settings: dict[str, Any] = {"dtype": self.dtype, "kernel_init": _uniform}
        norm = parts.norms(self.norm, momentum=0.6, epsilon=1e-12, use_scale=False, dtype=self.dtype)
        whiten = Conv(8 * x.shape[-1], 2, padding="VALID", **settings, name="whiten")
        x = self.activation(whiten(x))
        given: dict[str, Any] = {"norm": norm, "activation": self.activation, "dtype": self.dtype}
        for i, width in enumerate(self.widths):
            x = parts.make(self.block, f"group{i + 1}", features=width, **given)(x, train)
        x = max_pool(x, 3, 3)
        return x.reshape(x.shape[0], -1) * jnp.asarray(self.scale, self.dtype)

    @staticmethod
    def init_on_images(params: Any, images: jax.Array) -> Any:
        """The parameters with the whitening kernel for images f32[n, h, w, c], normalized.

        Its filters are the eigenvectors of the covariance of all 2×2 patches, by falling eigenvalue and each divided by
        its root (plus 5e-4), and then the same with the other sign.
        """
        _, h, w, c = images.shape
        patches = jnp.stack([images[:, i : h - 1 + i, j : w - 1 + j] for i in range(2) for j in range(2)], 3)
        patches = patches.reshape(-1, 4 * c)
        values, vectors = jnp.linalg.eigh(patches.T @ patches / len(patches))  # rising
        filters = (vectors / jnp.sqrt(values + 5e-4))[:, ::-1]  # [4c, 4c], a filter a column
        kernel = jnp.concatenate([filters, -filters], 1).reshape(2, 2, c, 8 * c)
        return {**params, "whiten": {**params["whiten"], "kernel": kernel}}

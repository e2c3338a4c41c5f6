"""The airbench94 network, a CIFAR-10 speed record when published (Jordan 2024, arXiv:2404.00498)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core.typing import Arguments, ModuleDef, Params
from imgclf_jax.models import parts
from imgclf_jax.models.layers import Conv, gelu, max_pool
from imgclf_jax.models.norms import BatchNorm

_torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default


def _dirac(key: jax.Array, shape: tuple[int, int, int, int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """A kernel [kh, kw, c, f], f ≥ c, that copies its inputs to the first c outputs; the other outputs are random."""
    kh, kw, c, _ = shape
    kernel = _torch_uniform(key, shape, dtype).at[..., :c].set(0)
    return kernel.at[kh // 2, kw // 2, jnp.arange(c), jnp.arange(c)].set(1)


class ConvGroup(nn.Module):
    """Conv 3×3, max-pool 2×2, norm, GELU, conv 3×3, norm, GELU; convolutions have no bias."""

    features: int
    dtype: DTypeLike = jnp.float32
    norm: ModuleDef = BatchNorm
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        settings: Arguments = {"use_bias": False, "dtype": self.dtype, "kernel_init": _dirac}
        norm = parts.norms(self.norm, dtype=self.dtype)
        x = max_pool(Conv(self.features, 3, **settings, name="conv1")(x), 2, 2)
        x = self.activation(norm("norm1")(x, train))
        x = Conv(self.features, 3, **settings, name="conv2")(x)
        return self.activation(norm("norm2")(x, train))


class AirBench(nn.Module):
    """Whitening 2×2 convolution, one `ConvGroup` per width, 3×3 max-pool, flatten: [b, h, w, c] → [b, d].

    With the default widths d is 256 for 32×32 pixels. `init_on_images` sets the whitening kernel, which the recipe
    freezes. `scale` multiplies the features, and so the logits.
    """

    widths: tuple[int, ...] = (64, 256, 256)
    scale: float = 1 / 9
    dtype: DTypeLike = jnp.float32
    block: ModuleDef = ConvGroup
    norm: ModuleDef = BatchNorm
    activation: Callable[[jax.Array], jax.Array] = gelu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = parts.norms(self.norm, momentum=0.6, epsilon=1e-12, use_scale=False, dtype=self.dtype)
        whiten = Conv(8 * x.shape[-1], 2, padding="VALID", dtype=self.dtype, kernel_init=_torch_uniform, name="whiten")
        x = self.activation(whiten(x))
        block = parts.block_of(self, norm)
        for i, width in enumerate(self.widths):
            x = block(features=width, name=f"group{i + 1}")(x, train)
        x = max_pool(x, 3, 3)
        return x.reshape(x.shape[0], -1) * jnp.asarray(self.scale, self.dtype)

    @staticmethod
    def init_on_images(params: Params, images: jax.Array) -> Params:
        """Returns `params` with the whitening kernel computed from normalized images f32[n, h, w, c].

        Its filters are the eigenvectors of the covariance of all 2×2 patches, by decreasing eigenvalue v, divided by
        the square root of v + 5e-4; then the same filters negated.
        """
        _, h, w, c = images.shape
        patches = jnp.stack([images[:, i : h - 1 + i, j : w - 1 + j] for i in range(2) for j in range(2)], 3)
        patches = patches.reshape(-1, 4 * c)
        values, vectors = jnp.linalg.eigh(patches.T @ patches / len(patches))  # ascending
        filters = (vectors / jnp.sqrt(values + 5e-4))[:, ::-1]  # [4c, 4c], one filter per column
        kernel = jnp.concatenate([filters, -filters], 1).reshape(2, 2, c, 8 * c)
        return {**params, "whiten": {**params["whiten"], "kernel": kernel}}

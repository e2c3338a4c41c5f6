"""The small backbones, from CNN to AirBench, and the table of all: images [b, h, w, c] → features [b, d]."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.typing import Arguments, ModuleDef, Params
from imgclf_jax.models import parts
from imgclf_jax.models.convnext import ConvNeXt
from imgclf_jax.models.efficientnet import EfficientNet, MobileNet
from imgclf_jax.models.layers import Conv, ConvPool, Dense, gelu, max_pool, mean_pool
from imgclf_jax.models.norms import BatchNorm
from imgclf_jax.models.resnet import RegNetY, ResNet, ResNetCIFAR, WideResNet
from imgclf_jax.models.vit import Mixer, ViT

_dense_init, _he_uniform = nn.initializers.glorot_uniform(), nn.initializers.he_uniform()
_torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default
_SQUEEZED = (16, 16, 32, 32, 48, 48, 64, 64)  # channels of fire2 to fire9, which expand to eight times as many


class CNN(nn.Module):
    """The Keras MNIST example without its head: conv, ReLU and 2×2 max-pool for each width, then a dense layer.

    With the defaults on [b, 28, 28, 1]: 26×26×32 → 13×13×32 → 11×11×64 → 5×5×64 → 1600 → 64.
    """

    widths: tuple[int, ...] = (32, 64)
    hidden: int = 64
    kernel: int = 3
    dtype: DTypeLike = jnp.float32
    trains_on_onednn = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        h, w = x.shape[1:3]
        for i, width in enumerate(self.widths):
            if min(x.shape[1:3]) < self.kernel + 1:  # too small for one pooling window
                raise UserError(f"cnn: images of {h} by {w} are too small for {len(self.widths)} blocks of convolution "
                                "and pooling; resize them or use fewer widths")  # fmt: skip
            x = ConvPool(width, self.kernel, dtype=self.dtype, name=f"block{i}")(x)  # [b, ~h/2, ~w/2, width]
        x = x.reshape(x.shape[0], -1)
        return nn.relu(Dense(self.hidden, dtype=self.dtype, kernel_init=_dense_init, name="dense")(x))


class MLP(nn.Module):
    """Flattened pixels through dense layers, each followed by the activation and dropout: → [b, widths[-1]]."""

    widths: tuple[int, ...] = (512, 512)
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(x.shape[0], -1)  # [b, h * w * c]
        for i, width in enumerate(self.widths):
            x = self.activation(Dense(width, dtype=self.dtype, kernel_init=_dense_init, name=f"dense{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x


class RNN(nn.Module):
    """A recurrent network over the rows of the image, a sequence of h vectors of w * c values: → [b, features].

    `cell`, linen's, is "lstm" (Hochreiter and Schmidhuber 1997, forget-gate bias 0) or "gru" (Cho et al. 2014, the
    variant that applies the reset gate after the matmul). The output is the last layer's state after the last row.
    """

    cell: str = "lstm"
    features: int = 128
    layers: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        cells = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}
        if self.cell not in cells:
            raise UserError(unknown("rnn cell", self.cell, cells))
        x = x.reshape(*x.shape[:2], -1)  # [b, h, w * c]
        for i in range(self.layers):
            cell = cells[self.cell](
                self.features, dtype=self.dtype, name=f"cell{i}",
                carry_init=lambda key, shape, dtype: jnp.zeros(shape, self.dtype),  # linen's would be float32
            )  # fmt: skip
            x = cast(jax.Array, nn.RNN(cell, name=f"rnn{i}")(x))  # [b, h, features]
        return x[:, -1]


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
    """SqueezeNet 1.1 (Iandola et al. 2016, arXiv:1602.07360), with the authors' later, faster stages: → [b, 512].

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
    """The airbench94 network, a CIFAR-10 speed record when published (Jordan 2024, arXiv:2404.00498).

    Whitening 2×2 convolution, one `ConvGroup` per width, 3×3 max-pool, flatten: [b, h, w, c] → [b, d].

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


BACKBONES = {
    "cnn": CNN,
    "mlp": MLP,
    "rnn": RNN,
    "resnet": ResNet,
    "resnet_cifar": ResNetCIFAR,
    "wide_resnet": WideResNet,
    "convnext": ConvNeXt,
    "efficientnet": EfficientNet,
    "mobilenet": MobileNet,
    "regnety": RegNetY,
    "squeezenet": SqueezeNet,
    "vit": ViT,
    "mixer": Mixer,
    "airbench": AirBench,
}

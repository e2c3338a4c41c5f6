"""The small backbones CNN, MLP and RNN, and the table of all backbones: images [b, h, w, c] → features [b, d]."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core.errors import UserError, check_choice
from imgclf_jax.models.airbench import AirBench
from imgclf_jax.models.convnext import ConvNeXt
from imgclf_jax.models.efficientnet import EfficientNet, MobileNet
from imgclf_jax.models.layers import ConvPool, Dense
from imgclf_jax.models.regnet import RegNetY
from imgclf_jax.models.resnet import ResNet, ResNetCIFAR, WideResNet
from imgclf_jax.models.squeezenet import SqueezeNet
from imgclf_jax.models.vit import Mixer, ViT

_dense_init = nn.initializers.glorot_uniform()


class CNN(nn.Module):
    """The Keras MNIST example without its head: conv, ReLU and 2×2 max-pool for each width, then a dense layer.

    With the defaults on [b, 28, 28, 1]: 26×26×32 → 13×13×32 → 11×11×64 → 5×5×64 → 1600 → 64.
    """

    widths: tuple[int, ...] = (32, 64)
    hidden: int = 64
    kernel: int = 3
    dtype: DTypeLike = jnp.float32
    on_onednn = False

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
        check_choice("rnn cell", self.cell, cells)
        x = x.reshape(*x.shape[:2], -1)  # [b, h, w * c]
        for i in range(self.layers):
            cell = cells[self.cell](
                self.features, dtype=self.dtype, name=f"cell{i}",
                carry_init=lambda key, shape, dtype: jnp.zeros(shape, self.dtype),  # linen's would be float32
            )  # fmt: skip
            x = cast(jax.Array, nn.RNN(cell, name=f"rnn{i}")(x))  # [b, h, features]
        return x[:, -1]


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

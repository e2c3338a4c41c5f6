"""Residual networks: He et al. 2015 (arXiv:1512.03385), for ImageNet and for CIFAR, and wide ones."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.models.layers import Conv, max_pool, mean_pool
from imgclf_jax.models.norms import BatchNorm
from imgclf_jax.models.remat import remat

_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _conv(features: int, kernel: int, strides: int, dtype: Any, name: str) -> Conv:
    """Padded to keep the size, without bias; initialized as in He et al. 2015, arXiv:1502.01852."""
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    pad = (kernel - 1) // 2
    return Conv(features, kernel, strides, pad, use_bias=False, dtype=dtype, kernel_init=init, name=name)


def _norm(momentum: float, dtype: Any, name: str, scale: float = 1.0) -> BatchNorm:
    return BatchNorm(momentum, dtype=dtype, scale_init=nn.initializers.constant(scale), name=name)


def _stages(
    block: Callable[..., nn.Module], features: int, depths: Sequence[int], x: jax.Array, train: bool
) -> jax.Array:
    """Stage i has `depths[i]` blocks of features * 2**i; all but the first begin with a stride of 2."""
    for i, blocks in enumerate(depths):
        for j in range(blocks):
            x = block(features * 2**i, 2 if i and not j else 1, name=f"layer{i + 1}_{j}")(x, train)
    return x


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; `shortcut` is "conv" (1×1 where the shape changes) or "pad" (zeros as new channels)."""

    features: int
    strides: int = 1
    shortcut: str = "conv"
    last_scale: float = 0.0
    momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv, norm = partial(_conv, dtype=self.dtype), partial(_norm, self.momentum, self.dtype)
        y = nn.relu(norm("bn1")(conv(self.features, 3, self.strides, name="conv1")(x), train))
        y = norm("bn2", self.last_scale)(conv(self.features, 3, 1, name="conv2")(y), train)
        if self.shortcut == "pad":
            new = self.features - x.shape[-1]
            widths = ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2))
            x = jnp.pad(x[:, :: self.strides, :: self.strides], widths)
        elif x.shape != y.shape:
            x = norm("downsample_bn")(conv(self.features, 1, self.strides, name="downsample_conv")(x), train)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions, to four times the features; the stride is the 3×3's, as in Goyal et al. 2017."""

    features: int
    strides: int = 1
    last_scale: float = 0.0
    momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv, norm = partial(_conv, dtype=self.dtype), partial(_norm, self.momentum, self.dtype)
        y = nn.relu(norm("bn1")(conv(self.features, 1, 1, name="conv1")(x), train))
        y = nn.relu(norm("bn2")(conv(self.features, 3, self.strides, name="conv2")(y), train))
        y = norm("bn3", self.last_scale)(conv(4 * self.features, 1, 1, name="conv3")(y), train)
        if x.shape != y.shape:
            shortcut = conv(4 * self.features, 1, self.strides, name="downsample_conv")
            x = norm("downsample_bn")(shortcut(x), train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The networks of table 1, of depth 18, 34, 50, 101 or 152: [b, h, w, c] → [b, 512], or [b, 2048] from 50 on.

    A block begins as the identity, its last scale being zero (Goyal et al. 2017, arXiv:1706.02677), unless `zero_init`
    is False.
    """

    depth: int = 50
    zero_init: bool = True
    momentum: float = 0.9
    remat: str = ""
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.depth not in _STAGES:
            raise UserError(unknown("resnet depth", str(self.depth), map(str, _STAGES)))
        block = remat(BasicBlock if self.depth < 50 else Bottleneck, self.remat)
        x = _conv(64, 7, 2, self.dtype, "conv1")(x)  # h/2, w/2, 64 channels
        x = max_pool(nn.relu(_norm(self.momentum, self.dtype, "bn1")(x, train)), 3, 2, 1)  # h/4, w/4
        scale = float(not self.zero_init)
        settings: dict[str, Any] = {"last_scale": scale, "momentum": self.momentum, "dtype": self.dtype}
        return mean_pool(_stages(partial(block, **settings), 64, _STAGES[self.depth], x, train))


class ResNetCIFAR(nn.Module):
    """The networks of section 4.2, of depth 6n + 2 (20, 32, 44, 56, 110): [b, h, w, c] → [b, 64].

    The shortcuts have no parameters: every second pixel, and zeros as new channels, half of them before the old ones
    and half behind, as in the public PyTorch checkpoints of these networks.
    """

    depth: int = 20
    momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise UserError(f"resnet_cifar(depth={self.depth}): allowed are 6n + 2, such as 20, 32, 44, 56, 110")
        x = _conv(16, 3, 1, self.dtype, "conv1")(x)
        x = nn.relu(_norm(self.momentum, self.dtype, "bn1")(x, train))
        block = partial(BasicBlock, shortcut="pad", last_scale=1.0, momentum=self.momentum, dtype=self.dtype)
        return mean_pool(_stages(block, 16, [(self.depth - 2) // 6] * 3, x, train))


class WideBlock(nn.Module):
    """Normalization and ReLU come before each convolution; dropout between the two."""

    features: int
    strides: int = 1
    dropout: float = 0.0
    momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv, norm = partial(_conv, dtype=self.dtype), partial(_norm, self.momentum, self.dtype)
        y = nn.relu(norm("bn1")(x, train))
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.strides, name="shortcut")(y)
        y = nn.relu(norm("bn2")(conv(self.features, 3, self.strides, name="conv1")(y), train))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return x + conv(self.features, 3, 1, name="conv2")(y)


class WideResNet(nn.Module):
    """WRN-depth-width of Zagoruyko and Komodakis 2016 (arXiv:1605.07146), depth 6n + 4: → [b, 64 * width]."""

    depth: int = 28
    width: int = 10
    dropout: float = 0.0
    momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise UserError(f"wide_resnet(depth={self.depth}): allowed are 6n + 4, such as 16, 22, 28, 40")
        x = _conv(16, 3, 1, self.dtype, "conv1")(x)
        block = partial(WideBlock, dropout=self.dropout, momentum=self.momentum, dtype=self.dtype)
        x = _stages(block, 16 * self.width, [(self.depth - 4) // 6] * 3, x, train)
        return mean_pool(nn.relu(_norm(self.momentum, self.dtype, "bn1")(x, train)))

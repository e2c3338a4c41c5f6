"""ResNets for ImageNet and for CIFAR (He et al. 2015, arXiv:1512.03385), and wide ResNets."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core import dtypes
from imgclf_jax.core.errors import UserError, check_choice
from imgclf_jax.core.typing import ModuleDef
from imgclf_jax.models import parts
from imgclf_jax.models.layers import SqueezeExcite, he_conv, max_pool, mean_pool
from imgclf_jax.models.norms import BatchNorm

_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _stages(block: ModuleDef, features: int, depths: Sequence[int], x: jax.Array, train: bool) -> jax.Array:
    """Applies `depths[i]` blocks of width features * 2**i for each stage i; every stage but the first has stride 2."""
    for i, blocks in enumerate(depths):
        for j in range(blocks):
            x = block(features=features * 2**i, strides=2 if i and not j else 1, name=f"layer{i + 1}_{j}")(x, train)
    return x


def _project(block: Any, x: jax.Array, features: int, norm: parts.Norm, train: bool) -> jax.Array:
    """A 1×1 convolution and a norm. The stride is the convolution's, or with `shortcut` "pool" an average pooling's."""
    name, strides = "downsample_pool" if block.shortcut == "pool" else "downsample", block.strides
    if block.shortcut == "pool" and strides == 2:  # of an odd side the last window has one pixel
        x = jnp.pad(x, ((0, 0), *((0, side % 2) for side in x.shape[1:3]), (0, 0)), "edge")
        windows = dtypes.upcast(x).reshape(-1, x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3])
        x, strides = jnp.mean(windows, (2, 4)).astype(x.dtype), 1
    return norm(f"{name}_bn")(he_conv(features, 1, strides, block.dtype, f"{name}_conv")(x), train)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: "conv" or "pool" (see `_project`), or "pad" (zeros as new channels)."""

    features: int
    strides: int = 1
    shortcut: str = "conv"
    last_scale: float = 0.0
    norm: ModuleDef = BatchNorm
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        check_choice("shortcut", self.shortcut, ("conv", "pad", "pool"))
        conv, norm = partial(he_conv, dtype=self.dtype), parts.norms(self.norm, dtype=self.dtype)
        y = self.activation(norm("bn1")(conv(self.features, 3, self.strides, name="conv1")(x), train))
        y = norm("bn2", self.last_scale)(conv(self.features, 3, 1, name="conv2")(y), train)
        if self.shortcut == "pad":
            new = self.features - x.shape[-1]
            widths = ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2))
            x = jnp.pad(x[:, :: self.strides, :: self.strides], widths)
        elif x.shape != y.shape:
            x = _project(self, x, self.features, norm, train)
        return self.activation(x + y)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions, to expansion * features; the 3×3 has the stride, as in Goyal et al. 2017.

    With `squeeze`, squeeze and excitation with a quarter of the block's channels stands before the last.
    """

    features: int
    strides: int = 1
    expansion: int = 4
    groups: int = 1  # of the 3×3 convolution
    squeeze: bool = False
    shortcut: str = "conv"
    last_scale: float = 0.0
    norm: ModuleDef = BatchNorm
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv, norm = partial(he_conv, dtype=self.dtype), parts.norms(self.norm, dtype=self.dtype)
        y = self.activation(norm("bn1")(conv(self.features, 1, 1, name="conv1")(x), train))
        y = conv(self.features, 3, self.strides, name="conv2", groups=self.groups)(y)
        y = self.activation(norm("bn2")(y, train))
        if self.squeeze:
            y = SqueezeExcite(round(x.shape[-1] / 4), self.activation, dtype=self.dtype, name="se")(y)
        y = norm("bn3", self.last_scale)(conv(self.expansion * self.features, 1, 1, name="conv3")(y), train)
        if x.shape != y.shape:
            x = _project(self, x, y.shape[-1], norm, train)
        return self.activation(x + y)


class ResNet(nn.Module):
    """ResNets of table 1, depth 18, 34, 50, 101 or 152: [b, h, w, c] → [b, 512], or [b, 2048] from depth 50 on.

    With `zero_init` blocks start as the identity: the scale of their last norm is 0 (Goyal et al., arXiv:1706.02677).
    `variant` "D" has three 3×3 convolutions as its stem, and average pooling in its shortcuts (He et al. 2018,
    arXiv:1812.01187).
    """

    depth: int = 50
    zero_init: bool = True
    remat: str = ""
    dtype: DTypeLike = jnp.float32
    block: ModuleDef | None = None  # None: BasicBlock below depth 50, else Bottleneck
    norm: ModuleDef = BatchNorm
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    variant: str = "B"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.depth not in _STAGES:
            raise UserError(f"resnet(depth={self.depth!r}): the depth must be one of {list(_STAGES)}")
        check_choice("resnet variant", self.variant, ("B", "D"))
        norm, passed = parts.norms(self.norm, momentum=0.9, dtype=self.dtype), {}
        if self.variant == "B":
            x = he_conv(64, 7, 2, self.dtype, "conv1")(x)  # h/2, w/2, 64 channels
        else:
            passed = {"shortcut": "pool"}
            for i in (1, 2):
                x = he_conv(32, 3, 3 - i, self.dtype, f"stem{i}_conv")(x)
                x = self.activation(norm(f"stem{i}_bn")(x, train))
            x = he_conv(64, 3, 1, self.dtype, "stem3_conv")(x)
        x = max_pool(self.activation(norm("bn1")(x, train)), 3, 2, 1)  # h/4, w/4
        block = self.block or (BasicBlock if self.depth < 50 else Bottleneck)
        block = parts.block_of(self, norm, block, last_scale=float(not self.zero_init), **passed)
        return mean_pool(_stages(block, 64, _STAGES[self.depth], x, train))


class ResNetCIFAR(nn.Module):
    """ResNets of section 4.2, depth 6n + 2 (20, 32, 44, 56, 110): [b, h, w, c] → [b, 64].

    Shortcuts have no parameters: they subsample every second pixel and pad the channels with zeros, half before and
    half after, as in akamaster's PyTorch checkpoints; with `shortcut` "conv" they are the paper's option B.
    """

    depth: int = 20
    shortcut: str = "pad"
    dtype: DTypeLike = jnp.float32
    block: ModuleDef = BasicBlock
    norm: ModuleDef = BatchNorm
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.depth % 6 != 2 or self.depth < 8:
            raise UserError(f"resnet_cifar(depth={self.depth}): the depth must be 6n + 2, such as 20 or 56")
        norm = parts.norms(self.norm, momentum=0.9, dtype=self.dtype)
        x = self.activation(norm("bn1")(he_conv(16, 3, 1, self.dtype, "conv1")(x), train))
        block = parts.block_of(self, norm, shortcut=self.shortcut, last_scale=1.0)
        return mean_pool(_stages(block, 16, [self.depth // 6] * 3, x, train))


class WideBlock(nn.Module):
    """A pre-activation block: norm, ReLU and 3×3 convolution, twice, with dropout in between."""

    features: int
    strides: int = 1
    dropout: float = 0.0
    norm: ModuleDef = BatchNorm
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv, norm = partial(he_conv, dtype=self.dtype), parts.norms(self.norm, dtype=self.dtype)
        y = self.activation(norm("bn1")(x, train))
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.strides, name="shortcut")(y)
        y = self.activation(norm("bn2")(conv(self.features, 3, self.strides, name="conv1")(y), train))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return x + conv(self.features, 3, 1, name="conv2")(y)


class WideResNet(nn.Module):
    """Wide ResNets of depth 6n + 4 (Zagoruyko and Komodakis 2016, arXiv:1605.07146): → [b, 64 * width]."""

    depth: int = 28
    width: int = 10
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    block: ModuleDef = WideBlock
    norm: ModuleDef = BatchNorm
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.depth % 6 != 4 or self.depth < 10:
            raise UserError(f"wide_resnet(depth={self.depth}): the depth must be 6n + 4, such as 28 or 40")
        norm = parts.norms(self.norm, momentum=0.9, dtype=self.dtype)
        x = he_conv(16, 3, 1, self.dtype, "conv1")(x)
        block = parts.block_of(self, norm, dropout=self.dropout)
        x = _stages(block, 16 * self.width, [self.depth // 6] * 3, x, train)
        return mean_pool(self.activation(norm("bn1")(x, train)))

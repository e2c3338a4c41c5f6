"""EfficientNet and MobileNet, networks of inverted residuals, whose variants differ in a table."""

from collections.abc import Callable, Iterator
from math import ceil
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.typing import Arguments, ModuleDef
from imgclf_jax.models import parts
from imgclf_jax.models.layers import SqueezeExcite, drop_path, he_conv, mean_pool
from imgclf_jax.models.norms import BatchNorm


class _Network(NamedTuple):
    """A variant. `stages` are separated by semicolons and their rows by commas, see `_blocks`."""

    stages: str
    width: float = 1.0  # multiplies the channels
    depth: float = 1.0  # multiplies the blocks of a stage
    stem: int = 32
    features: int = 1280
    fixed: bool = False  # whether `width` leaves stem and features as they are, and `depth` the first and last stage
    activation: Callable[[jax.Array], jax.Array] = nn.silu
    relu_stages: int = 0  # the first stages whose activation is ReLU
    head: str = "conv"  # "conv" before the pooling, or "bias" or "norm": a convolution behind it, with either


_B = "{0} 1 3 1 1 16; {1} 2 3 2 6 24; {1} 2 5 2 6 40; {1} 3 3 2 6 80; {1} 3 5 1 6 112; {1} 4 5 2 6 192; {1} 1 3 1 6 320"
_LITE = _Network(_B.format("ds", "ir"), fixed=True, activation=nn.relu6)
_EFFICIENTNETS = {
    **{f"B{i}": _Network(_B.format("ds-se", "ir-se"), *scales)
       for i, scales in enumerate(((1, 1), (1, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8)))},
    "V2-S": _Network("cn 2 3 1 1 24; er 4 3 2 4 48; er 4 3 2 4 64; ir-se 6 3 2 4 128; ir-se 9 3 1 6 160; "
                     "ir-se 15 3 2 6 256", stem=24),
    "Lite0": _LITE, "Lite1": _LITE._replace(depth=1.1), "Lite2": _LITE._replace(width=1.1, depth=1.2),
}  # fmt: skip
_MOBILENETS = {
    "V3-L": _Network(
        "ds 1 3 1 1 16; ir 1 3 2 4 24, ir 1 3 1 3 24; ir-se 3 5 2 3 40; ir 1 3 2 6 80, ir 1 3 1 2.5 80, "
        "ir 2 3 1 2.3 80; ir-se 2 3 1 6 112; ir-se 3 5 2 6 160; cn 1 1 1 1 960",
        stem=16, activation=nn.hard_silu, relu_stages=3, head="bias"),
    "V4-S": _Network(
        "cn 1 3 2 1 32, cn 1 1 1 1 32; cn 1 3 2 1 96, cn 1 1 1 1 64; ib 1 5+5 2 3 96, ib 4 0+3 1 2 96, "
        "ib 1 3+0 1 4 96; ib 1 3+3 2 6 128, ib 1 5+5 1 4 128, ib 1 0+5 1 4 128, ib 1 0+5 1 3 128, ib 2 0+3 1 4 128; "
        "cn 1 1 1 1 960",
        activation=nn.relu, head="norm"),
    "V4-M": _Network(
        "er 1 3 2 4 48; ib 1 3+5 2 4 80, ib 1 3+3 1 2 80; ib 1 3+5 2 6 160, ib 2 3+3 1 4 160, ib 1 3+5 1 4 160, "
        "ib 1 3+3 1 4 160, ib 1 3+0 1 4 160, ib 1 0+0 1 2 160, ib 1 3+0 1 4 160; ib 1 5+5 2 6 256, ib 1 5+5 1 4 256, "
        "ib 2 3+5 1 4 256, ib 1 0+0 1 4 256, ib 1 3+0 1 4 256, ib 1 3+5 1 2 256, ib 1 5+5 1 4 256, ib 2 0+0 1 4 256, "
        "ib 1 5+0 1 2 256; cn 1 1 1 1 960",
        activation=nn.relu, head="norm"),
}  # fmt: skip

_PADDING = {"tf": "SAME", "timm": None}


def _round(channels: float) -> int:
    """The nearest multiple of 8, or the next one if that is below 90 % of `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _blocks(network: _Network) -> Iterator[tuple[str, Arguments]]:
    """Yields (name, arguments) of the blocks: `InvertedResidual` explains them.

    A row is the kind, with "-se" for squeeze and excitation, the number of blocks, the kernel (of "ib" two, before and
    behind the expansion; 0 for none), the first block's stride, the expansion, and the channels.
    """
    stages = network.stages.split("; ")
    for i, stage in enumerate(stages):
        depth, j = 1.0 if network.fixed and i in (0, len(stages) - 1) else network.depth, 0
        for row in stage.split(", "):
            kind, blocks, kernel, strides, expand, channels = row.split()
            for n in range(ceil(int(blocks) * depth)):
                arguments: Arguments = {
                    "kind": kind.removesuffix("-se"), "kernels": tuple(map(int, kernel.split("+"))),
                    "expand": float(expand), "strides": 1 if n else int(strides),
                    "features": _round(int(channels) * network.width), "squeeze": 0.25 * kind.endswith("-se"),
                }  # fmt: skip
                yield f"stage{i}_{j}", arguments | ({"activation": nn.relu} if i < network.relu_stages else {})
                j += 1


class InvertedResidual(nn.Module):
    """Convolutions with a norm each, all but the first of "ib" and the last activated, and a shortcut if it fits.

    The kinds: "ir", an expansion, a depthwise convolution and a projection (MBConv; Sandler et al. 2018,
    arXiv:1801.04381); "ds", without expansion; "er", whose expansion is the spatial convolution (Fused-MBConv); "ib",
    with another depthwise convolution before the expansion (the universal inverted bottleneck of MobileNetV4); and
    "cn", one activated convolution. `squeeze`, if not 0, is the width of squeeze and excitation, as a fraction of the
    block's channels, or with `gate` hard sigmoid, as in MobileNetV3, of the expanded ones.
    """

    kind: str
    features: int
    kernels: tuple[int, ...] = (3,)
    strides: int = 1
    expand: float = 6
    squeeze: float = 0.0
    gate: Callable[[jax.Array], jax.Array] = nn.sigmoid
    drop_path: float = 0.0
    like: str = "tf"
    norm: ModuleDef = BatchNorm
    activation: Callable[[jax.Array], jax.Array] = nn.silu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        c, k, s = x.shape[-1], self.kernels[-1], self.strides
        mid = _round(c * self.expand)
        last = self.features, 1, 1, False, False
        steps = {  # (name, features, kernel, stride, whether it is depthwise, whether it is activated)
            "ir": (("conv_pw", mid, 1, 1, False, True), ("conv_dw", mid, k, s, True, True), ("conv_pwl", *last)),
            "ds": (("conv_dw", c, k, s, True, True), ("conv_pw", *last)),
            "er": (("conv_exp", mid, k, s, False, True), ("conv_pwl", *last)),
            "ib": (("dw_start", c, self.kernels[0], 1, True, False), ("pw_exp", mid, 1, 1, False, True),
                   ("dw_mid", mid, k, s, True, True), ("pw_proj", *last)),
            "cn": (("conv", self.features, k, s, False, True),),
        }[self.kind]  # fmt: skip
        norm, y = parts.norms(self.norm, dtype=self.dtype), x
        for n, (name, features, kernel, strides, depthwise, activated) in enumerate(steps):
            if self.squeeze and n == len(steps) - 1:
                hard = self.gate is nn.hard_sigmoid
                width = _round(y.shape[-1] * self.squeeze) if hard else int(c * self.squeeze)
                inner = nn.relu if hard else self.activation
                y = SqueezeExcite(width, inner, self.gate, self.dtype, name="se")(y)
            if kernel:
                groups = y.shape[-1] if depthwise else 1
                y = he_conv(features, kernel, strides, self.dtype, name, groups, padding=_PADDING[self.like])(y)
                y = norm(f"{name}_bn" if self.kind == "ib" else f"bn{n + 1}")(y, train)
                y = self.activation(y) if activated else y
        if x.shape != y.shape or (self.kind == "cn" and k == 1):
            return y
        return x + drop_path(self, y, self.drop_path, train)


class EfficientNet(nn.Module):
    """EfficientNet "B0" to "B4", "V2-S", "Lite0" to "Lite2": [b, h, w, c] → [b, d], 1,280 features for "B0".

    Tan and Le 2019 (arXiv:1905.11946) and 2021 (arXiv:2104.00298). `like` is "tf", the authors' SAME padding and an
    epsilon of 1e-3, or "timm", symmetric padding and 1e-5. `drop_path` grows linearly from 0 in the first block;
    `dropout` is that of the features. `activation` replaces the variant's.
    """

    variant: str = "B0"
    like: str = "tf"
    drop_path: float = 0.0
    dropout: float = 0.0
    momentum: float | None = None  # of the running statistics; None: 0.9, if the norm has any
    remat: str = ""
    dtype: DTypeLike = jnp.float32
    block: ModuleDef = InvertedResidual
    norm: ModuleDef = BatchNorm
    activation: Callable[[jax.Array], jax.Array] | None = None
    networks = _EFFICIENTNETS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.variant not in self.networks:
            raise UserError(unknown(f"{type(self).__name__.lower()} variant", self.variant, self.networks))
        if self.like not in _PADDING:
            raise UserError(f"like={self.like!r}: allowed are 'tf' and 'timm'")
        network, epsilon = self.networks[self.variant], 1e-3 if self.like == "tf" else 1e-5
        norm = parts.norms(self.norm, self.momentum, momentum=0.9, epsilon=epsilon, dtype=self.dtype)
        activation = self.activation or network.activation
        stem, features = (n if network.fixed else _round(n * network.width) for n in (network.stem, network.features))
        x = activation(
            norm("bn1")(he_conv(stem, 3, 2, self.dtype, "conv_stem", padding=_PADDING[self.like])(x), train)
        )  # [b, h/2, w/2, stem]
        block, blocks = parts.remat(self.block, self.remat), list(_blocks(network))
        passed: Arguments = {"like": self.like, "norm": norm, "activation": activation, "dtype": self.dtype}
        if network.head == "bias":
            passed["gate"] = nn.hard_sigmoid
        for n, (name, arguments) in enumerate(blocks):
            if self.activation:
                arguments["activation"] = activation
            x = block(**passed | arguments, drop_path=self.drop_path * n / len(blocks), name=name)(x, train)
        if network.head != "conv":
            x = mean_pool(x)[:, None, None]  # [b, 1, 1, c]
        x = he_conv(features, 1, 1, self.dtype, "conv_head", use_bias=network.head == "bias")(x)
        x = activation(x if network.head == "bias" else norm("bn2")(x, train))
        return nn.Dropout(self.dropout, deterministic=not train)(mean_pool(x))


class MobileNet(EfficientNet):
    """MobileNet "V3-L", "V4-S" and "V4-M", the latter without attention: [b, h, w, c] → [b, 1280].

    Howard et al. 2019 (arXiv:1905.02244) and Qin et al. 2024 (arXiv:2404.10518). The arguments are EfficientNet's.
    """

    variant: str = "V3-L"
    like: str = "timm"
    networks = _MOBILENETS

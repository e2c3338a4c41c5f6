"""EfficientNet and MobileNet, networks of inverted residuals, whose variants differ in a table."""

from collections.abc import Callable, Iterator
from math import ceil
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core.errors import check_choice
from imgclf_jax.core.typing import Arguments, ModuleDef
from imgclf_jax.models import parts
from imgclf_jax.models.layers import SqueezeExcite, drop_path, he_conv, mean_pool
from imgclf_jax.models.norms import BatchNorm


class _Network(NamedTuple):
    """A variant; see `_blocks` for its `stages`.

    `width` multiplies the channels, `depth` the blocks of a stage; `fixed` leaves the stem, the features, and the first
    and last stage as they are. `head` is the last convolution: before the pooling ("conv"), or behind it, with a "norm"
    or a "bias".
    """

    stages: str
    width: float = 1.0
    depth: float = 1.0
    stem: int = 32
    features: int = 1280
    fixed: bool = False
    activation: Callable[[jax.Array], jax.Array] = nn.silu
    relu_stages: int = 0  # the first stages, whose activation is ReLU
    head: str = "conv"


_B = "{0} 1 3 1 1 16; {1} 2 3 2 6 24; {1} 2 5 2 6 40; {1} 3 3 2 6 80; {1} 3 5 1 6 112; {1} 4 5 2 6 192; {1} 1 3 1 6 320"
_LITE = _Network(_B.format("ds", "ir"), fixed=True, activation=nn.relu6)
_EFFICIENTNETS = {
    **{f"B{i}": _Network(_B.format("ds/se", "ir/se"), *scales)
       for i, scales in enumerate(((1, 1), (1, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8)))},
    "V2-S": _Network("cn 2 3 1 1 24; er 4 3 2 4 48; er 4 3 2 4 64; ir/se 6 3 2 4 128; ir/se 9 3 1 6 160; "
                     "ir/se 15 3 2 6 256", stem=24),
    "Lite0": _LITE, "Lite1": _LITE._replace(depth=1.1), "Lite2": _LITE._replace(width=1.1, depth=1.2),
}  # fmt: skip
_MOBILENETS = {
    "V3-L": _Network(
        "ds 1 3 1 1 16; ir 1 3 2 4 24, ir 1 3 1 3 24; ir/hard 3 5 2 3 40; ir 1 3 2 6 80, ir 1 3 1 2.5 80, "
        "ir 2 3 1 2.3 80; ir/hard 2 3 1 6 112; ir/hard 3 5 2 6 160; cn 1 1 1 1 960",
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

_LIKE: dict[str, tuple[str | None, float]] = {"tf": ("SAME", 1e-3), "timm": (None, 1e-5)}  # padding, epsilon


def _round(channels: float) -> int:
    """The nearest multiple of 8, or the next one if that is below 90 % of `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _blocks(network: _Network) -> Iterator[Arguments]:
    """Yields the arguments of each `InvertedResidual`, from stages joined by semicolons and rows joined by commas.

    A row is: the kind, of "kind/squeeze" both; the number of blocks; the kernel (of "ib" two, before and behind the
    expansion; 0 for none); the first block's stride; the expansion; the channels.
    """
    for i, stage in enumerate(stages := network.stages.split("; ")):
        depth = 1.0 if network.fixed and i in (0, len(stages) - 1) else network.depth
        rows = [(row, n) for row in map(str.split, stage.split(", ")) for n in range(ceil(int(row[1]) * depth))]
        for j, ((kind, _, kernels, strides, expand, channels), n) in enumerate(rows):
            yield {
                "name": f"stage{i}_{j}", "kind": kind.split("/")[0], "squeeze": kind.partition("/")[2],
                "kernels": tuple(map(int, kernels.split("+"))), "strides": 1 if n else int(strides),
                "expand": float(expand), "features": _round(int(channels) * network.width),
                "activation": nn.relu if i < network.relu_stages else network.activation,
            }  # fmt: skip


class InvertedResidual(nn.Module):
    """Convolutions with a norm each, all but the first of "ib" and the last activated, and a shortcut if it fits.

    The kinds: "ir", an expansion, a depthwise convolution and a projection (MBConv; Sandler et al. 2018,
    arXiv:1801.04381); "ds", without expansion; "er", whose expansion is the spatial convolution (Fused-MBConv); "ib",
    with another depthwise convolution before the expansion (the universal inverted bottleneck of MobileNetV4); "cn",
    one activated convolution. `squeeze` is "se" or, as in MobileNetV3, "hard": squeeze and excitation with a quarter of
    the block's channels, or with a quarter of the expanded ones, ReLU and a hard sigmoid.
    """

    kind: str
    features: int
    kernels: tuple[int, ...]
    strides: int
    expand: float
    squeeze: str = ""
    drop_path: float = 0.0
    padding: str | None = None
    norm: ModuleDef = BatchNorm
    activation: Callable[[jax.Array], jax.Array] = nn.silu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        c, k, s = x.shape[-1], self.kernels[-1], self.strides
        mid, last = _round(c * self.expand), (self.features, 1, 1, False, False)
        steps = {  # (name, features, kernel, stride, whether it is depthwise, whether it is activated)
            "ir": (("conv_pw", mid, 1, 1, False, True), ("conv_dw", mid, k, s, True, True), ("conv_pwl", *last)),
            "ds": (("conv_dw", c, k, s, True, True), ("conv_pw", *last)),
            "er": (("conv_exp", mid, k, s, False, True), ("conv_pwl", *last)),
            "ib": (("dw_start", c, self.kernels[0], 1, True, False), ("pw_exp", mid, 1, 1, False, True),
                   ("dw_mid", mid, k, s, True, True), ("pw_proj", *last)),
            "cn": (("conv", self.features, k, s, False, True),),
        }[self.kind]  # fmt: skip
        gates = {"se": (c // 4, self.activation, nn.sigmoid), "hard": (_round(mid / 4), nn.relu, nn.hard_sigmoid)}
        norm, y = parts.norms(self.norm, dtype=self.dtype), x
        for n, (name, features, kernel, strides, depthwise, activated) in enumerate(steps, 1):
            if n == len(steps) and self.squeeze:
                y = SqueezeExcite(*gates[self.squeeze], self.dtype, name="se")(y)
            if kernel:
                groups = y.shape[-1] if depthwise else 1
                y = he_conv(features, kernel, strides, self.dtype, name, groups, padding=self.padding)(y)
                y = norm(f"{name}_bn" if self.kind == "ib" else f"bn{n}")(y, train)
                y = self.activation(y) if activated else y
        fits = x.shape == y.shape and (self.kind, k) != ("cn", 1)
        return x + drop_path(self, y, self.drop_path, train) if fits else y


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
    remat: str = ""
    dtype: DTypeLike = jnp.float32
    block: ModuleDef = InvertedResidual
    norm: ModuleDef = BatchNorm
    activation: Callable[[jax.Array], jax.Array] | None = None
    networks = _EFFICIENTNETS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for value, allowed in ((self.variant, self.networks), (self.like, _LIKE)):
            check_choice(type(self).__name__.lower(), value, allowed)
        network, (padding, epsilon) = self.networks[self.variant], _LIKE[self.like]
        if self.activation:
            network = network._replace(activation=self.activation, relu_stages=0)
        norm = parts.norms(self.norm, momentum=0.9, epsilon=epsilon, dtype=self.dtype)
        stem, features = (n if network.fixed else _round(n * network.width) for n in (network.stem, network.features))
        x = he_conv(stem, 3, 2, self.dtype, "conv_stem", padding=padding)(x)  # [b, h/2, w/2, stem]
        x = network.activation(norm("bn1")(x, train))
        block, blocks = parts.block_of(self, norm, padding=padding), list(_blocks(network))
        for n, arguments in enumerate(blocks):
            x = block(drop_path=self.drop_path * n / len(blocks), **arguments)(x, train)
        x = x if network.head == "conv" else mean_pool(x)[:, None, None]  # [b, 1, 1, c]
        x = he_conv(features, 1, 1, self.dtype, "conv_head", use_bias=network.head == "bias")(x)
        x = network.activation(x if network.head == "bias" else norm("bn2")(x, train))
        return nn.Dropout(self.dropout, deterministic=not train)(mean_pool(x))


class MobileNet(EfficientNet):
    """MobileNet "V3-L", "V4-S" and "V4-M", the latter without attention: [b, h, w, c] → [b, 1280].

    Howard et al. 2019 (arXiv:1905.02244) and Qin et al. 2024 (arXiv:2404.10518). The arguments are EfficientNet's.
    """

    variant: str = "V3-L"
    like: str = "timm"
    networks = _MOBILENETS

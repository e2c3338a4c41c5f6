"""The benchmarked networks by name, with a builder for each framework and a FLOP count.

A new network is one entry in NETWORKS. Builders import their framework when called, so that the orchestrator, which
only reads FLOP counts, imports none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Network:
    """One architecture in each framework; `model` is its spec here. Frameworks without a builder are skipped."""

    image_shape: tuple[int, int, int]  # (h, w, c)
    classes: int
    model: str
    layer_flops: tuple[int, ...]  # of one image's forward pass, first layer first; a multiply-add counts as two
    torch: Callable[[], Any]  # images f32[b, c, h, w] → logits
    images: int = 12_800  # in memory, unless --images says otherwise
    keras: Callable[[], Any] | None = None  # images f32[b, h, w, c] → logits, not compiled
    linen: Callable[[Any], Any] | None = None  # dtype → backbone: images f32[b, h, w, c] → features in this dtype

    @property
    def inference_flops(self) -> int:
        """FLOPs of the matmuls and convolutions in one image's forward pass."""
        return sum(self.layer_flops)

    @property
    def training_flops(self) -> int:
        """FLOPs of one image's forward and backward pass, without the gradient of the image."""
        return 3 * sum(self.layer_flops) - self.layer_flops[0]


def examples(network: Network, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images uint8[count, h, w, c] and labels i32[count], the same for every variant."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *network.image_shape), np.uint8)
    return images, rng.integers(0, network.classes, count, np.int32)


def conv_flops(height: int, width: int, kernel: int, channels: int, features: int) -> int:
    """FLOPs of a convolution with the output [height, width, features]."""
    return 2 * height * width * kernel**2 * channels * features


def dense_flops(inputs: int, features: int) -> int:
    """FLOPs of a dense layer."""
    return 2 * inputs * features


def _cnn_keras() -> Any:
    from keras import Sequential, layers

    first = [layers.Input((28, 28, 1)), layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D(2)]
    second = [layers.Conv2D(64, 3, activation="relu"), layers.MaxPooling2D(2), layers.Flatten()]
    return Sequential([*first, *second, layers.Dense(64, activation="relu"), layers.Dense(10)])


def _cnn_torch() -> Any:
    from torch import nn

    convolutions = nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1600, 64), nn.ReLU(), nn.Linear(64, 10))


def _resnet20_torch() -> Any:
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, inputs: int, features: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(features)
            self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(features)
            self.stride, self.new = stride, features - inputs

        def forward(self, x: Any) -> Any:
            y = functional.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            if self.new:
                half = self.new // 2
                x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new - half))
            return functional.relu(x + y)

    blocks = [
        Block(16 * 2 ** max(0, i - (j == 0)), 16 * 2**i, 2 if i and not j else 1) for i in range(3) for j in range(3)
    ]
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _resnet20_flops() -> tuple[int, ...]:
    flops = [conv_flops(32, 32, 3, 3, 16)]
    for i in range(3):
        size, features = 32 // 2**i, 16 * 2**i
        first = features // 2 if i else features
        flops += [conv_flops(size, size, 3, first if j == 0 else features, features) for j in range(6)]
    return (*flops, dense_flops(64, 10))


def _vit_flops(width: int, patches: int, patch: int, classes: int) -> tuple[int, ...]:
    tokens = patches + 1
    attention = [tokens * dense_flops(width, 3 * width), 2 * 2 * tokens**2 * width, tokens * dense_flops(width, width)]
    block = [*attention, tokens * dense_flops(width, 4 * width), tokens * dense_flops(4 * width, width)]
    return (patches * dense_flops(patch * patch * 3, width), *(12 * block), dense_flops(width, classes))


def _resnet_flops(depths: tuple[int, ...], bottleneck: bool) -> tuple[int, ...]:
    flops, channels = [conv_flops(112, 112, 7, 3, 64)], 64
    for i, depth in enumerate(depths):
        size, width = 56 // 2**i, 64 * 2**i
        out = 4 * width if bottleneck else width
        for j in range(depth):
            before = 2 * size if i and not j else size  # the size that the stride of the block's 3×3 convolution halves
            if bottleneck:
                flops += [conv_flops(before, before, 1, channels, width), conv_flops(size, size, 3, width, width),
                          conv_flops(size, size, 1, width, out)]  # fmt: skip
            else:
                flops += [conv_flops(size, size, 3, channels, width), conv_flops(size, size, 3, width, width)]
            if channels != out:
                flops.append(conv_flops(size, size, 1, channels, out))
            channels = out
    return (*flops, dense_flops(channels, 1000))


def _convnext_flops(depths: tuple[int, ...], widths: tuple[int, ...]) -> tuple[int, ...]:
    flops = [conv_flops(56, 56, 4, 3, widths[0])]
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        size = 56 // 2**i
        if i:
            flops.append(conv_flops(size, size, 2, widths[i - 1], width))
        block = [conv_flops(size, size, 7, 1, width), 2 * size**2 * dense_flops(width, 4 * width)]
        flops += depth * block
    return (*flops, dense_flops(widths[-1], 1000))


def _linen(name: str, **fields: Any) -> Callable[[Any], Any]:
    def build(dtype: Any) -> Any:
        from peers import linen_twins

        return getattr(linen_twins, name)(dtype=dtype, **fields)

    return build


def _timm(name: str, **fields: Any) -> Callable[[], Any]:
    def build() -> Any:
        import timm

        return timm.create_model(name, **fields)

    return build


def _at_224(model: str, flops: tuple[int, ...], timm_name: str, linen: Callable[[Any], Any]) -> Network:
    return Network((224, 224, 3), 1000, model, flops, _timm(timm_name), images=512, linen=linen)


# fmt: off
NETWORKS = {
    # 28×28×1 → 26×26×32 → 13×13×32 → 11×11×64 → 5×5×64 → 1600 → 64 → 10: 121,930 parameters
    "cnn": Network(
        (28, 28, 1), 10, "cnn(widths=(32, 64), hidden=64)",
        (conv_flops(26, 26, 3, 1, 32), conv_flops(10, 10, 3, 32, 64),  # the pooling drops the eleventh row and column
         dense_flops(1600, 64), dense_flops(64, 10)),
        _cnn_torch, keras=_cnn_keras, linen=_linen("CNN"),
    ),
    # He et al. 2015, section 4.2: 269,722 parameters
    "resnet20": Network(
        (32, 32, 3), 10, "resnet_cifar(depth=20)", _resnet20_flops(), _resnet20_torch,
        linen=_linen("ResNet", depths=(3, 3, 3), features=16, bottleneck=False, cifar=True),
    ),
    # ViT-Ti on patches of 4×4: 5,362,762 parameters
    "vit_ti4": Network(
        (32, 32, 3), 10, "vit('Ti', patch=4)", _vit_flops(192, 64, 4, 10),
        _timm("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10),
        linen=_linen("ViT", width=192, heads=3, patch=4),
    ),
    # At the size of ImageNet, beside timm's; 11,689,512, 25,557,032, 28,589,128 and 22,050,664 parameters
    "resnet18": _at_224("resnet(depth=18)", _resnet_flops((2, 2, 2, 2), False), "resnet18",
                        _linen("ResNet", depths=(2, 2, 2, 2), bottleneck=False)),
    "resnet50": _at_224("resnet(depth=50)", _resnet_flops((3, 4, 6, 3), True), "resnet50", _linen("ResNet")),
    "convnext_t": _at_224("convnext('T')", _convnext_flops((3, 3, 9, 3), (96, 192, 384, 768)), "convnext_tiny",
                          _linen("ConvNeXt")),
    "vit_s16": _at_224("vit('S', patch=16)", _vit_flops(384, 196, 16, 1000), "vit_small_patch16_224", _linen("ViT")),
}
# fmt: on

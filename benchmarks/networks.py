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
    steps_per_call: int = 10  # of this project's training; 0: the default of a run
    keras: Callable[[], Any] | None = None  # images f32[b, h, w, c] → logits, not compiled
    linen: Callable[[], Any] | None = None  # images f32[b, h, w, c] → logits

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

    return Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def _cnn_torch() -> Any:
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1600, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _cnn_linen() -> Any:
    from flax import linen as nn

    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for features in (32, 64):
                x = nn.relu(nn.Conv(features, (3, 3), padding="VALID")(x))
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = x.reshape(x.shape[0], -1)
            x = nn.relu(nn.Dense(64)(x))
            return nn.Dense(10)(x)

    return CNN()


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


def _vit_torch() -> Any:
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: Any) -> Any:
            b, n, d = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v)
            x = x + self.proj(y.transpose(1, 2).reshape(b, n, d))
            return x + self.mlp(self.norm2(x))

    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 192, 4, 4)
            self.token = nn.Parameter(torch.zeros(1, 1, 192))
            self.positions = nn.Parameter(torch.randn(1, 65, 192) * 0.02)
            self.blocks = nn.Sequential(*(Block(192, 3) for _ in range(12)))
            self.norm, self.head = nn.LayerNorm(192, 1e-6), nn.Linear(192, 10)

        def forward(self, x: Any) -> Any:
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), 1, 192), x], 1) + self.positions
            return self.head(self.norm(self.blocks(x))[:, 0])

    return ViT()


def _resnet20_flops() -> tuple[int, ...]:
    flops = [conv_flops(32, 32, 3, 3, 16)]
    for i in range(3):
        size, features = 32 // 2**i, 16 * 2**i
        first = features // 2 if i else features
        flops += [conv_flops(size, size, 3, first if j == 0 else features, features) for j in range(6)]
    return (*flops, dense_flops(64, 10))


def _vit_flops() -> tuple[int, ...]:
    tokens, width = 65, 192
    attention = [tokens * dense_flops(width, 3 * width), 2 * 2 * tokens**2 * width, tokens * dense_flops(width, width)]
    block = [*attention, tokens * dense_flops(width, 4 * width), tokens * dense_flops(4 * width, width)]
    return (64 * dense_flops(4 * 4 * 3, width), *(12 * block), dense_flops(width, 10))


NETWORKS = {
    # 28×28×1 → 26×26×32 → 13×13×32 → 11×11×64 → 5×5×64 → 1600 → 64 → 10: 121,930 parameters
    "cnn": Network(
        image_shape=(28, 28, 1),
        classes=10,
        model="cnn(widths=(32, 64), hidden=64)",
        layer_flops=(
            conv_flops(26, 26, 3, 1, 32),  # 389,376
            conv_flops(10, 10, 3, 32, 64),  # 3,686,400: the pooling drops the eleventh row and column
            dense_flops(1600, 64),  # 204,800
            dense_flops(64, 10),  # 1,280
        ),  # inference 4,281,856 an image, training 12,456,192
        keras=_cnn_keras,
        torch=_cnn_torch,
        linen=_cnn_linen,
        steps_per_call=0,  # a step takes milliseconds
    ),
    # He et al. 2015, section 4.2: 269,722 parameters
    "resnet20": Network((32, 32, 3), 10, "resnet_cifar(depth=20)", _resnet20_flops(), _resnet20_torch),
    # ViT-Ti on patches of 4×4: 5,362,762 parameters
    "vit_ti4": Network((32, 32, 3), 10, "vit('Ti', patch=4)", _vit_flops(), _vit_torch),
}

"""The networks that are measured, each under one name: for every framework a builder, and the count of its FLOPs.

A new network is one entry in NETWORKS. Builders import their framework when called, so that the orchestrator, which
reads the FLOP counts, imports none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Network:
    """One architecture as each framework writes it; `model` is this project's spec of it."""

    image_shape: tuple[int, int, int]  # (h, w, c)
    classes: int
    model: str
    layer_flops: tuple[int, ...]  # of one image's forward pass, first layer first; a multiply-add is two
    keras: Callable[[], Any]  # images f32[b, h, w, c] → logits, not compiled
    torch: Callable[[], Any]  # images f32[b, c, h, w] → logits
    linen: Callable[[], Any]  # images f32[b, h, w, c] → logits

    @property
    def inference_flops(self) -> int:
        """Of the matrix products and convolutions of one image's forward pass."""
        return sum(self.layer_flops)

    @property
    def training_flops(self) -> int:
        """Of one image's forward pass, weight gradients and input gradients; nobody needs the first layer's input's."""
        return 3 * sum(self.layer_flops) - self.layer_flops[0]


def examples(network: Network, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The random images uint8[count, h, w, c] and labels i32[count] that every variant is measured on."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *network.image_shape), np.uint8)
    return images, rng.integers(0, network.classes, count, np.int32)


def conv_flops(height: int, width: int, kernel: int, channels: int, features: int) -> int:
    """Of a convolution whose output is [height, width, features]."""
    return 2 * height * width * kernel**2 * channels * features


def dense_flops(inputs: int, features: int) -> int:
    """Of a dense layer."""
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
    ),
}

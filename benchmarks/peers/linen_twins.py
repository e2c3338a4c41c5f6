"""This project's networks in idiomatic Flax: linen's own layers, computing in `dtype`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class _MLP(nn.Module):
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype)(x), approximate=False)
        return nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class _Attention(nn.Module):
    """One dense layer for queries, keys and values; `nn.MultiHeadDotProductAttention`, with three, moves more."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, n, d = x.shape
        qkv = nn.Dense(3 * d, dtype=self.dtype)(x).reshape(b, n, 3, self.heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))  # [b, n, heads, d / heads]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        return nn.Dense(d, dtype=self.dtype)(y.reshape(b, n, d))


class ViT(nn.Module):
    """Dosovitskiy et al. 2020, with a class token and learned positions."""

    width: int = 384
    layers: int = 12
    heads: int = 6
    patch: int = 16
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        d, side = self.width, (self.patch, self.patch)
        x = nn.Conv(d, side, side, "VALID", dtype=self.dtype)(x)
        x = x.reshape(x.shape[0], -1, d)  # [b, n, d]
        token = self.param("cls", nn.initializers.zeros, (1, 1, d)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, d)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:])).astype(x.dtype)
        for _ in range(self.layers):
            y = nn.LayerNorm(dtype=self.dtype)(x)
            x = x + _Attention(self.heads, self.dtype)(y)
            x = x + _MLP(4 * d, self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return nn.LayerNorm(dtype=self.dtype)(x)[:, 0]


class Mixer(nn.Module):
    """Tolstikhin et al. 2021."""

    width: int = 512
    layers: int = 8
    hidden: tuple[int, int] = (256, 2048)
    patch: int = 16
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, side, "VALID", dtype=self.dtype)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        for _ in range(self.layers):
            y = nn.LayerNorm(dtype=self.dtype)(x).swapaxes(1, 2)
            x = x + _MLP(self.hidden[0], self.dtype)(y).swapaxes(1, 2)
            x = x + _MLP(self.hidden[1], self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return jnp.mean(nn.LayerNorm(dtype=self.dtype)(x), 1)


class ConvNeXt(nn.Module):
    """Liu et al. 2022."""

    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        for i, (depth, d) in enumerate(zip(self.depths, self.dims, strict=True)):
            if i:
                x = nn.Conv(d, (2, 2), (2, 2), "VALID", dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
            else:
                x = nn.LayerNorm(dtype=self.dtype)(nn.Conv(d, (4, 4), (4, 4), "VALID", dtype=self.dtype)(x))
            for j in range(depth):
                y = nn.Conv(d, (7, 7), feature_group_count=d, dtype=self.dtype)(x)
                y = _MLP(4 * d, self.dtype)(nn.LayerNorm(dtype=self.dtype)(y))
                x = x + y * self.param(f"gamma{i}_{j}", nn.initializers.constant(1e-6), (d,)).astype(y.dtype)
        return nn.LayerNorm(dtype=self.dtype)(jnp.mean(x, (1, 2)))


class _Block(nn.Module):
    features: int
    strides: int
    norm: Callable[..., Any]
    bottleneck: bool
    cifar: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv, f, s = partial(nn.Conv, use_bias=False, dtype=self.dtype), self.features, (self.strides, self.strides)
        zeros = {"scale_init": nn.initializers.zeros}
        if self.bottleneck:
            y = nn.relu(self.norm()(conv(f, (1, 1))(x)))
            y = nn.relu(self.norm()(conv(f, (3, 3), s, padding=1)(y)))
            y = self.norm(**zeros)(conv(4 * f, (1, 1))(y))
        else:
            y = nn.relu(self.norm()(conv(f, (3, 3), s, padding=1)(x)))
            y = self.norm(**({} if self.cifar else zeros))(conv(f, (3, 3), padding=1)(y))
        if x.shape != y.shape and self.cifar:
            new = f - x.shape[-1]
            x = jnp.pad(x[:, :: self.strides, :: self.strides], [(0, 0)] * 3 + [(new // 2, new - new // 2)])
        elif x.shape != y.shape:
            x = self.norm()(conv(y.shape[-1], (1, 1), s)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """He et al. 2015: for ImageNet, or the small networks of its section 4.2 (`cifar`)."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    features: int = 64
    bottleneck: bool = True
    cifar: bool = False
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        size, s = (3, 1) if self.cifar else (7, 2)
        x = nn.Conv(self.features, (size, size), (s, s), size // 2, use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(norm()(x))
        if not self.cifar:
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for i, blocks in enumerate(self.depths):
            for j in range(blocks):
                strides = 2 if i and not j else 1
                x = _Block(self.features * 2**i, strides, norm, self.bottleneck, self.cifar, self.dtype)(x)
        return jnp.mean(x, (1, 2))


class CNN(nn.Module):
    """The tutorial's network up to its last layer."""

    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3), padding="VALID", dtype=self.dtype)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.relu(nn.Dense(64, dtype=self.dtype)(x.reshape(x.shape[0], -1)))


class AirBench(nn.Module):
    """Jordan 2024; the whitening layer is like any other here."""

    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        conv = partial(nn.Conv, kernel_size=(3, 3), use_bias=False, dtype=self.dtype)
        gelu = partial(nn.gelu, approximate=False)
        settings: dict[str, Any] = {"momentum": 0.6, "epsilon": 1e-12, "use_scale": False, "dtype": self.dtype}
        norm = partial(nn.BatchNorm, use_running_average=not train, **settings)
        x = gelu(nn.Conv(24, (2, 2), padding="VALID", dtype=self.dtype)(x))
        for features in (64, 256, 256):
            x = nn.max_pool(conv(features)(x), (2, 2), strides=(2, 2))
            x = gelu(norm()(x))
            x = gelu(norm()(conv(features)(x)))
        x = nn.max_pool(x, (3, 3), strides=(3, 3))
        return x.reshape(x.shape[0], -1) / 9


class Classifier(nn.Module):
    """A backbone and a dense layer in float32."""

    backbone: nn.Module
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        return nn.Dense(self.classes)(self.backbone(x, train))


# This project's spec, the shape of its images, its classes, and the network in linen.
TWINS: dict[str, tuple[str, tuple[int, int, int], int, Callable[[], nn.Module]]] = {
    "vit": ("vit('S', patch=16)", (224, 224, 3), 1000, ViT),
    "mixer": ("mixer('S', patch=16)", (224, 224, 3), 1000, Mixer),
    "resnet50": ("resnet(depth=50)", (224, 224, 3), 1000, ResNet),
    "convnext": ("convnext('T')", (224, 224, 3), 1000, ConvNeXt),
    "resnet20": ("resnet_cifar(depth=20)", (32, 32, 3), 10, partial(ResNet, (3, 3, 3), 16, False, True)),
    "cnn": ("cnn()", (28, 28, 1), 10, CNN),
    "airbench": ("airbench", (32, 32, 3), 10, AirBench),
}

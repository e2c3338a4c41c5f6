"""Layers that models share: linen's parameters and results, computed in the form that is fast on the platform.

Arrays are [b, h, w, c] or [b, n, d] everywhere. On CPU layers are matrix products on arrays whose features come first
(`cpu/`); on GPU and TPU they are XLA's own. `platform.tracing_for` says which platform is traced for; outside of it
layers take XLA's own form, which runs everywhere.

`dtype` is what products are computed in and what a layer gives. Sums over many elements, such as a mean or a bias's
gradient, are in float32 at least, within a device and over all of them. But off CPU a kernel's gradient leaves its
product in `dtype`, as it does in linen, and the devices' parts of it are summed in `dtype` too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from imgclf_jax.core import platform
from imgclf_jax.models.cpu import pool, products
from imgclf_jax.models.cpu.layout import features_first, features_last, on_cpu
from imgclf_jax.models.cpu.sums import broadcast_along

_FEW_TAPS = 27  # products an output: up to so many, convolution and pooling are one pass over the images on CPU


def widen(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 if it is: what statistics, sums and losses are computed in."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[Any] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    dtype: Any = None,
) -> jax.Array:
    """The convolution (cross-correlation) of x [b, h, w, c] with kernel [kh, kw, c // groups, f] → [b, ho, wo, f].

    `padding` is "SAME", "VALID", a number, or one (before, after) a dimension. The operands are cast to `dtype`
    (default: x's). The result is in it, or, from the products of the CPU's form, in float32.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    strides, dilation = _pair(strides), _pair(dilation)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True)]
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:3], extent, strides, padding)
    else:
        each: Sequence[Any] = (padding, padding) if isinstance(padding, int) else padding
        pads = [_pair(p) for p in each]
    if on_cpu() and groups == 1 and dilation == (1, 1):
        y = products.conv(features_first(x), kernel, strides, (_pair(pads[0]), _pair(pads[1])), dtype)
        return features_last(y)
    return lax.conv_general_dilated(
        x.astype(dtype), kernel.astype(dtype), strides, pads, rhs_dilation=dilation, feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., f] + bias [f], in float32 at least, as the bias's gradient is."""
    x = widen(x)
    if on_cpu():
        return features_last(broadcast_along(bias.astype(x.dtype), shape=features_first(x).shape, axis=0)) + x
    return x + bias.astype(x.dtype)


def spread(parameter: jax.Array, x: jax.Array) -> jax.Array:
    """The parameter in the dtype of x and broadcast to its shape. Its gradient is summed in float32, its own dtype."""
    return _spread(x.shape, x.dtype, parameter)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _spread(shape: tuple[int, ...], dtype: Any, parameter: jax.Array) -> jax.Array:
    return jnp.broadcast_to(parameter.astype(dtype), shape)


@_spread.defjvp
def _spread_jvp(shape: tuple[int, ...], dtype: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # The other way round, so that the transpose casts before it sums.
    return _spread(shape, dtype, *primals), jnp.broadcast_to(tangents[0], shape).astype(dtype)


class Conv(nn.Module):
    """`nn.Conv` for images [b, h, w, c]: the same parameters (`kernel` HWIO, `bias`) and the same results."""

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str | int | Sequence[Any] = "SAME"
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*_pair(self.kernel_size), x.shape[-1] // self.feature_group_count, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        y = conv(x, kernel, self.strides, self.padding, self.kernel_dilation, self.feature_group_count, self.dtype)
        if self.use_bias:
            y = add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,)))
        return y.astype(self.dtype)


class ConvPool(nn.Module):
    """Convolution ("VALID"), bias, ReLU, max-pool: [b, h, w, c] → [b, ~h/2, ~w/2, features] in `dtype`.

    The bias and ReLU come after the maximum, which gives the same, since both are monotonic, for a quarter of the work.
    On CPU what follows a bfloat16 convolution is in float32, since bfloat16 arithmetic is slow there, and the
    convolution of images of few channels is in float32 too.
    """

    features: int
    kernel_size: int = 3
    window: int = 2
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.glorot_uniform()  # Keras's default

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (*_pair(self.kernel_size), x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        k, window = self.kernel_size, self.window
        if on_cpu():
            few = k**2 * x.shape[-1] <= _FEW_TAPS
            conv_pool = pool.conv_pool_direct if few else pool.conv_pool
            return features_last(conv_pool(features_first(x), kernel, bias, window, self.dtype))
        # Only the outputs that fill windows: those left over at the edges would be computed for nothing.
        h, w = ((n - k + 1) // window * window + k - 1 for n in x.shape[1:3])
        y = max_pool(conv(x[:, :h, :w], kernel, padding="VALID", dtype=self.dtype), window, window)
        return nn.relu(add_bias(y, bias)).astype(self.dtype)


class FlatDense(nn.Module):
    """`nn.Dense` over the flattened image: [b, h, w, c] → [b, features], the same parameters and the same results."""

    features: int
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        kernel = self.param("kernel", self.kernel_init, (h * w * c, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if on_cpu():
            y = features_last(products.flat_dense(features_first(x), kernel, self.dtype))
        else:
            y = jnp.dot(x.reshape(b, -1).astype(self.dtype), kernel.astype(self.dtype))
        return add_bias(y, bias).astype(self.dtype)


class Dense(nn.Module):
    """`nn.Dense` over the features [..., c]: the same parameters, and results in `dtype`."""

    features: int
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if on_cpu():
            y = features_last(products.dense(features_first(x), kernel, self.dtype))
        else:
            y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        return add_bias(y, bias).astype(self.dtype)


def max_pool(x: jax.Array, window: int, strides: int, padding: int = 0) -> jax.Array:
    """The greatest value under each window of [b, h, w, c]; of equals the first gets the gradient.

    On CPU as maxima of strided slices: there the gradient of XLA's own is ten times slower. On GPU too, since that is a
    scatter there, which takes sorting to give the same bits each time.
    """
    if platform.current() == "gpu":
        return _max_pool(window, strides, padding, x)
    if not on_cpu():
        return nn.max_pool(x, (window, window), (strides, strides), [(padding, padding)] * 2)
    if strides == window and not padding:
        return features_last(pool.max_pool(features_first(x), window))
    return functools.reduce(_maximum, _seen(x, window, strides, padding, -jnp.inf))


def _seen(x: jax.Array, window: int, strides: int, padding: int, fill: float) -> list[jax.Array]:
    """What each place of the window sees of x [b, h, w, c], as strided slices [b, ho, wo, c]."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=fill)
    ho, wo = ((n - window) // strides + 1 for n in x.shape[1:3])

    def at(i: int, j: int) -> jax.Array:
        rows, columns = (slice(k, k + (n - 1) * strides + 1, strides) for k, n in ((i, ho), (j, wo)))
        return x[:, rows, columns]

    return [at(i, j) for i in range(window) for j in range(window)]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _max_pool(window: int, strides: int, padding: int, x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (window, window), (strides, strides), [(padding, padding)] * 2)


@_max_pool.defjvp
def _max_pool_jvp(window: int, strides: int, padding: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The derivative is that of the first greatest value; its transpose adds one array for each place of the window."""
    (x,), (d_x,) = primals, tangents
    y = _max_pool(window, strides, padding, x)
    seen = _seen(x, window, strides, padding, -jnp.inf)
    first = jnp.full(y.shape, len(seen), jnp.uint8)  # the place of that value
    for i in reversed(range(len(seen))):
        first = jnp.where(seen[i] == y, jnp.uint8(i), first)
    zero = jnp.zeros((), y.dtype)
    d_seen = _seen(d_x, window, strides, padding, 0)
    return y, functools.reduce(jnp.add, [jnp.where(first == i, d, zero) for i, d in enumerate(d_seen)])


@jax.custom_jvp
def _maximum(a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.maximum`, whose gradient at equals goes to `a` alone."""
    return jnp.maximum(a, b)


@_maximum.defjvp
def _maximum_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> Any:
    a, b = primals
    return jnp.maximum(a, b), jnp.where(a >= b, *tangents)


def mean_pool(x: jax.Array) -> jax.Array:
    """The mean over all pixels [b, h, w, c] → [b, c], or over all tokens [b, n, d] → [b, d], in x's dtype."""
    return jnp.mean(widen(x), range(1, x.ndim - 1)).astype(x.dtype)


def _below(x: jax.Array) -> jax.Array:
    """The normal distribution's share below x; Flax computes it by `erfc`, which is several times slower on CPU."""
    return 0.5 * (1 + lax.erf(x * float(0.5**0.5)))


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's share below x (Hendrycks and Gimpel 2016, arXiv:1606.08415), in x's dtype.

    Computed in float32 (or float64).
    """
    wide = widen(x)
    return (wide * _below(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # To compute the error function again is faster than to store it; without the barrier XLA stores it.
    x = widen(platform.cpu_barrier(primals[0]))
    density = jnp.exp(-0.5 * lax.square(x)) * float(1 / (2 * np.pi) ** 0.5)
    return gelu(*primals), (widen(tangents[0]) * (_below(x) + x * density)).astype(tangents[0].dtype)


def drop_path(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training x is zero for a whole example.

    With probability `rate`, and scaled by 1 / (1 - rate) otherwise. The examples are on the first axis.
    """
    if not train or rate == 0:
        return x
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, (x.shape[0], *[1] * (x.ndim - 1)))
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))

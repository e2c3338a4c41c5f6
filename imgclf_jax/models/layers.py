"""Layers with linen's parameters and results, each computed in the fastest form for the platform.

Arrays are [b, h, w, c] or [b, n, d] on every platform. In programs for CPU that take gradients, layers are matmuls on
feature-first arrays (`cpu/`). Everywhere else they are plain XLA operations: on GPU and TPU, in forward passes on CPU,
which oneDNN computes, and outside `platform.tracing_for`, which sets the target platform.

A layer computes its matmuls, and returns its output, in `dtype`. Means, bias gradients and other sums accumulate in at
least float32, also across devices; a kernel's gradient off CPU is a matmul result in `dtype`, as in linen.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from imgclf_jax.core import dtypes, platform
from imgclf_jax.core.typing import Initializer
from imgclf_jax.models.cpu import matmuls, onednn, pool, sums
from imgclf_jax.models.cpu.matmuls import features_first, features_last, wants_features_first

_FEW_TAPS_ON_TPU = 36  # a float32 kernel with up to so many takes XLA's TPU compiler minutes, for its gradient


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def conv(
    x: jax.Array, kernel: jax.Array, strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME", dilation: int | Sequence[int] = 1, groups: int = 1,
    dtype: DTypeLike | None = None,
) -> jax.Array:  # fmt: skip
    """Convolution (cross-correlation) of x [b, h, w, c] with kernel [kh, kw, c // groups, f] → [b, ho, wo, f].

    `padding` is "SAME", "VALID", a number, or one (before, after) per dimension. The operands are cast to `dtype`
    (default: x's). The result is in `dtype`, or in float32 where a form for CPU computes it.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    strides, dilation = _pair(strides), _pair(dilation)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True)]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], extent, strides, padding)
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    pads = _pair(rows), _pair(columns)
    if wants_features_first() and groups == 1:
        settings = {"strides": strides, "pads": pads, "dilation": dilation, "dtype": dtype}
        # Readers that compute a sum of few taps again may round it otherwise: then no value equals their maximum.
        return features_last(lax.optimization_barrier(matmuls.conv(features_first(x), kernel, **settings)))
    if groups > 1 and dtype == jnp.bfloat16 and platform.uses_onednn():
        dtype = jnp.dtype(jnp.float32)  # a bfloat16 convolution of groups is up to 50 times slower there
    depthwise = groups == x.shape[3] == kernel.shape[3]
    if platform.uses_onednn() and (groups == 1 or depthwise) and dilation == (1, 1):
        return onednn.conv(x, kernel, strides=strides, pads=pads, dtype=dtype)
    x, kernel, form = x.astype(dtype), kernel.astype(dtype), ("NHWC", "HWIO", "NHWC")
    few = groups == 1 and kernel.shape[:2] != (1, 1) and kernel[..., 0].size <= _FEW_TAPS_ON_TPU
    if few and platform.current() == "tpu" and dtype != jnp.bfloat16:
        patches = lax.conv_general_dilated_patches(
            x, kernel.shape[:2], strides, pads, rhs_dilation=dilation, dimension_numbers=form,
            precision=lax.Precision.HIGHEST,
        )  # fmt: skip
        return patches @ kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[3])
    return lax.conv_general_dilated(
        x, kernel, strides, pads, rhs_dilation=dilation, feature_group_count=groups, dimension_numbers=form
    )


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., f] + bias [f] in at least float32, so that the bias gradient accumulates in float32."""
    x = dtypes.upcast(x)
    if platform.current() == "cpu":
        return x + sums.broadcast(bias.astype(x.dtype), shape=x.shape)
    return x + bias.astype(x.dtype)


def spread(parameter: jax.Array, x: jax.Array) -> jax.Array:
    """Broadcasts a parameter to x's shape, then casts it to x's dtype; so its gradient is summed in float32."""
    return jnp.broadcast_to(parameter, x.shape).astype(x.dtype)


class Conv(nn.Module):
    """`nn.Conv` for images [b, h, w, c]: the same parameters (`kernel` HWIO, `bias`) and the same results."""

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME"
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*_pair(self.kernel_size), x.shape[-1] // self.feature_group_count, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        y = conv(x, kernel, self.strides, self.padding, self.kernel_dilation, self.feature_group_count, self.dtype)
        if self.use_bias:
            y = add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,)))
        return y.astype(self.dtype)


def he_conv(
    features: int, kernel: int, strides: int, dtype: DTypeLike, name: str, groups: int = 1, use_bias: bool = False,
    padding: str | int | None = None,
) -> Conv:  # fmt: skip
    """A convolution with He initialization (arXiv:1502.01852), by default padded to keep the size, without bias."""
    # Of a grouped convolution, linen's fan-out is that of all groups together; the fan-in is that of one.
    init = nn.initializers.variance_scaling(2.0, "fan_in" if groups > 1 else "fan_out", "normal")
    pad = (kernel - 1) // 2 if padding is None else padding
    return Conv(features, kernel, strides, pad, 1, groups, use_bias, dtype, init, name=name)


class ConvPool(nn.Module):
    """Convolution ("VALID"), bias, ReLU, max-pool: [b, h, w, c] → [b, ~h/2, ~w/2, features] in `dtype`.

    Bias and ReLU are applied after the maximum: both are monotonic, so the result is the same for a quarter of the
    work. On CPU, where bfloat16 arithmetic is slow, everything after a bfloat16 convolution is in float32.
    """

    features: int
    kernel_size: int = 3
    window: int = 2
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.glorot_uniform()  # Keras's default

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (*_pair(self.kernel_size), x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        k, window = self.kernel_size, self.window
        crop_h, crop_w = ((n - k + 1) % window for n in x.shape[1:3])  # what would fill no pooling window
        if wants_features_first():  # where im2col crops and pads in one pass
            settings = {"strides": (1, 1), "pads": ((0, -crop_h), (0, -crop_w)), "dilation": (1, 1)}
            y = matmuls.conv(features_first(x), kernel, **settings, dtype=jnp.dtype(self.dtype))
            return features_last(pool.pool_bias_relu(y, bias, window, self.dtype))
        x = x[:, : x.shape[1] - crop_h, : x.shape[2] - crop_w]
        y = max_pool(conv(x, kernel, padding=0, dtype=self.dtype), window, window)
        return nn.relu(add_bias(y, bias)).astype(self.dtype)


class Dense(nn.Module):
    """`nn.Dense` over the last axis, [..., c] → [..., features]: the same parameters; the result is in `dtype`."""

    features: int
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        if wants_features_first() and x.ndim == 2:  # a convolution of one pixel
            y = conv(x[:, None, None], kernel[None, None], dtype=self.dtype)[:, 0, 0]
        else:
            y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        return (y if bias is None else add_bias(y, bias)).astype(self.dtype)


def max_pool(x: jax.Array, window: int, strides: int, padding: int = 0) -> jax.Array:
    """Max pooling of [b, h, w, c]; among ties the first gets the gradient.

    On CPU and GPU the gradient goes through strided slices. That of XLA's own pooling is ten times slower on CPU, and a
    scatter on GPU, where bitwise determinism would cost a sort.
    """
    if platform.current() not in ("cpu", "gpu"):
        return nn.max_pool(x, (window, window), (strides, strides), [(padding, padding)] * 2)
    return _max_pool(window, strides, padding, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _max_pool(window: int, strides: int, padding: int, x: jax.Array) -> jax.Array:
    if platform.current() == "gpu":  # in one kernel
        return nn.max_pool(x, (window, window), (strides, strides), [(padding, padding)] * 2)
    return functools.reduce(jnp.maximum, pool.window_slices(x, window, strides, padding, -jnp.inf))


@_max_pool.defjvp
def _max_pool_jvp(
    window: int, strides: int, padding: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The tangent of the first maximum. The transpose adds one array per window offset instead of scattering."""
    primals = platform.cpu_barrier(primals)  # the maximum and its position must see the same roundings
    y = _max_pool(window, strides, padding, *primals)
    argmax = pool.first_argmax(pool.window_slices(*primals, window, strides, padding, -jnp.inf), y)
    take = pool.take_max_fast if platform.current() == "cpu" else pool.take_max
    return y, take(*tangents, argmax, window=window, strides=strides, padding=padding)


def mean_pool(x: jax.Array) -> jax.Array:
    """Global average pooling over pixels [b, h, w, c] → [b, c] or tokens [b, n, d] → [b, d], in x's dtype."""
    return jnp.mean(dtypes.upcast(x), range(1, x.ndim - 1)).astype(x.dtype)


class SqueezeExcite(nn.Module):
    """Scales the channels of [b, h, w, c] by a gate of their means (Hu et al. 2018, arXiv:1709.01507)."""

    width: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    gate: Callable[[jax.Array], jax.Array] = nn.sigmoid
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(he_conv, kernel=1, strides=1, dtype=self.dtype, use_bias=True)
        y = self.activation(conv(self.width, name="reduce")(mean_pool(x)[:, None, None]))  # [b, 1, 1, width]
        return x * spread(dtypes.upcast(self.gate(conv(x.shape[-1], name="expand")(y))), x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    """The standard normal CDF by `erf`, which is several times faster on CPU than Flax's `erfc`."""
    return 0.5 * (1 + lax.erf(x * float(0.5**0.5)))


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x times its normal CDF (Hendrycks and Gimpel 2016, arXiv:1606.08415), by at least float32."""
    wide = dtypes.upcast(x)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # Recomputing erf is faster than storing it; without the barrier XLA stores it.
    x = dtypes.upcast(platform.cpu_barrier(primals[0]))
    density = jnp.exp(-0.5 * lax.square(x)) * float(1 / (2 * np.pi) ** 0.5)
    return gelu(*primals), (dtypes.upcast(tangents[0]) * (_normal_cdf(x) + x * density)).astype(tangents[0].dtype)


def drop_path(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training, zeros x [b, …] for random examples.

    Each example is dropped with probability `rate`, in [0, 1); those kept are scaled by 1 / (1 - rate).
    """
    if not train or rate == 0:
        return x
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, (x.shape[0], *[1] * (x.ndim - 1)))
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))

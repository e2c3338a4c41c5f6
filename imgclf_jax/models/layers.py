"""Layers that models share: linen's parameters and results, computed in the form that is fast on the platform.

On CPU they are matrix products on mirrored images (`layout.py`, `mirrored.py`); on GPU and TPU XLA's own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from imgclf_jax.models.cpu import layout, pool, products

_FEW_TAPS = 27  # products an output: up to so many, convolution and pooling are one pass over the images


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[Any] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    inside: bool = False,
    dtype: Any = None,
) -> jax.Array:
    """The convolution (cross-correlation) of x [b, h, w, c] with kernel [kh, kw, c // groups, f] → [b, ho, wo, f].

    With `inside`, mirrored: [c, h, w, b] → [f, ho, wo, b]; there a plain convolution is matrix products. Any other
    falls through to `lax.conv_general_dilated`. `padding` is "SAME", "VALID", a number, or one (before, after) a
    dimension; the operands are cast to `dtype` (default: x's), the result is in it or, from products, in float32.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    strides, dilation = _pair(strides), _pair(dilation)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True)]
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:3], extent, strides, padding)
    else:
        each: Sequence[Any] = (padding, padding) if isinstance(padding, int) else padding
        pads = [_pair(p) for p in each]
    if inside and groups == 1 and dilation == (1, 1):
        return products.conv(x, kernel, strides, (_pair(pads[0]), _pair(pads[1])), dtype)
    names = "CHWN" if inside else "NHWC"
    return lax.conv_general_dilated(
        x.astype(dtype), kernel.astype(dtype), strides, pads, rhs_dilation=dilation, feature_group_count=groups,
        dimension_numbers=(names, "HWIO", names),
    )  # fmt: skip


class Conv(nn.Module):
    """`nn.Conv` for images [b, h, w, c]: the same parameters (`kernel` HWIO, `bias`) and the same results.

    With `inner` images come and go as layers compute (see `inner`), and the result may be in float32.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str | int | Sequence[Any] = "SAME"
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    inner: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.inner:
            x = layout.inner(x)
        axis = layout.channel_axis()
        shape = (*_pair(self.kernel_size), x.shape[axis] // self.feature_group_count, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        y = conv(
            x, kernel, self.strides, self.padding, self.kernel_dilation, self.feature_group_count, axis == 0, self.dtype
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
            y = y + (bias[:, None, None, None] if axis == 0 else bias)
        return y if self.inner else layout.inner(y).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def pool_bias_relu(x: jax.Array, bias: jax.Array, window: int, dtype: Any) -> jax.Array:
    """relu(max_pool(x) + bias) in `dtype` of x [b, h, w, f], over windows that do not overlap.

    The same as `nn.relu(nn.max_pool(x + bias, …))`, since adding a constant is monotonic, with a quarter of the
    element-wise work. Its gradient is the same too: where several elements share the maximum the first one gets it. All
    that is kept for the gradient is the place of each maximum in its window: one byte an output.
    """
    return _pool_forward(x, bias, window, dtype)[0]


def _pool_forward(x: jax.Array, bias: jax.Array, window: int, dtype: Any) -> tuple[jax.Array, Any]:
    out, place = pool.pooled(pool.window_cells(x, window), bias, dtype)
    return out, (place, x[:0], bias[:0])


def _pool_backward(window: int, dtype: Any, saved: Any, gradient: jax.Array) -> tuple[Any, Any]:
    place, x, bias = saved  # of x and bias only shape and dtype
    d_x = pool.unpooled(place, gradient, window)
    rest = [(0, n - pooled) for n, pooled in zip(x.shape[1:3], d_x.shape[1:3], strict=True)]
    passed = jnp.where(place >= 0, gradient.astype(x.dtype), 0)
    return jnp.pad(d_x, ((0, 0), *rest, (0, 0))).astype(x.dtype), jnp.sum(passed, (0, 1, 2)).astype(bias.dtype)


pool_bias_relu.defvjp(_pool_forward, _pool_backward)


class ConvPool(nn.Module):
    """Convolution ("VALID"), bias, ReLU, max-pool: [b, h, w, c] → [b, ~h/2, ~w/2, features] in `dtype`.

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
        if layout.on_mirrored():
            few = k**2 * x.shape[-1] <= _FEW_TAPS
            conv_pool = pool.conv_pool_direct if few else pool.conv_pool
            return layout.mirror(conv_pool(layout.mirror(x), kernel, bias, window, self.dtype))
        # Only the outputs that fill windows: those left over at the edges would be computed for nothing.
        h, w = ((n - k + 1) // window * window + k - 1 for n in x.shape[1:3])
        y = conv(x[:, :h, :w], kernel, padding="VALID", dtype=self.dtype)
        return pool_bias_relu(y, bias, window, self.dtype)


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
        if layout.on_mirrored():
            y = products.dense(layout.mirror(x), kernel, self.dtype).T
        else:
            y = jnp.dot(x.reshape(b, -1).astype(self.dtype), kernel.astype(self.dtype))
        return (y + bias.astype(y.dtype)).astype(self.dtype)


def max_pool(x: jax.Array, window: int, strides: int, padding: int = 0) -> jax.Array:
    """The greatest value under each window of `inner` images; of equals the first gets the gradient.

    On CPU as maxima of strided slices: there the gradient of XLA's own is ten times slower.
    """
    if not layout.on_mirrored():
        return nn.max_pool(x, (window, window), (strides, strides), [(padding, padding)] * 2)
    if strides == window and not padding:
        return pool.max_pool(x, window)
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=-jnp.inf)
    ho, wo = ((n - window) // strides + 1 for n in x.shape[1:3])

    def seen(i: int, j: int) -> jax.Array:
        rows, columns = (slice(k, k + (n - 1) * strides + 1, strides) for k, n in ((i, ho), (j, wo)))
        return x[:, rows, columns]

    return functools.reduce(_maximum, [seen(i, j) for i in range(window) for j in range(window)])


@jax.custom_jvp
def _maximum(a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.maximum`, whose gradient at equals goes to `a` alone."""
    return jnp.maximum(a, b)


@_maximum.defjvp
def _maximum_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> Any:
    a, b = primals
    return jnp.maximum(a, b), jnp.where(a >= b, *tangents)


def mean_pool(x: jax.Array) -> jax.Array:
    """The mean over all pixels of `inner` images → [b, c], summed in float32 at least."""
    mean = jnp.mean(layout.widen(x), (1, 2)).astype(x.dtype)
    return mean.T if layout.on_mirrored() else mean


class Dense(nn.Module):
    """`nn.Dense` on `tokens`: the same parameters, and results in `dtype`."""

    features: int
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[layout.features_axis()], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if layout.on_mirrored():
            y = products.dense_first(x, kernel, self.dtype)
        else:
            y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        return _add_bias(y, bias, layout.features_axis() % x.ndim, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _add_bias(x: jax.Array, bias: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """x + bias, in `dtype`; the bias's gradient is summed as is fast."""
    return _add_bias_forward(x, bias, axis, dtype)[0]


def _add_bias_forward(x: jax.Array, bias: jax.Array, axis: int, dtype: Any) -> tuple[jax.Array, Any]:
    y = (layout.widen(x) + layout.spread(layout.widen(bias), axis, x)).astype(dtype)
    return y, (jnp.empty(0, x.dtype), jnp.empty(0, bias.dtype))  # for their dtypes


def _add_bias_backward(
    axis: int, dtype: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, bias = saved
    return gradient.astype(x.dtype), layout.sum_but(layout.widen(gradient), axis).astype(bias.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def _below(x: jax.Array) -> jax.Array:
    """The normal distribution's share below x; Flax computes it by `erfc`, which is several times slower on CPU."""
    return 0.5 * (1 + lax.erf(x * float(0.5**0.5)))


@jax.custom_vjp
def _gelu(x: jax.Array) -> jax.Array:
    return x * _below(x)


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    x = lax.optimization_barrier(x)  # or XLA keeps what the forward pass computed
    density = jnp.exp(-0.5 * lax.square(x)) * float(1 / (2 * np.pi) ** 0.5)
    return (gradient * (_below(x) + x * density),)


# All that is kept for the gradient is x: to compute the error function again is faster than to store it.
_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)


def gelu(x: jax.Array, dtype: Any) -> jax.Array:
    """x times the normal distribution's share below x (Hendrycks and Gimpel 2016, arXiv:1606.08415), in `dtype`.

    Computed in float32 (or float64).
    """
    return _gelu(layout.widen(x)).astype(dtype)


def drop_path(module: nn.Module, x: jax.Array, rate: float, train: bool, axis: int = 0) -> jax.Array:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training x is zero for a whole example.

    With probability `rate`, and scaled by 1 / (1 - rate) otherwise. The examples are on `axis`.
    """
    if not train or rate == 0:
        return x
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, (x.shape[axis],))
    kept = layout.spread(kept, axis, x)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))

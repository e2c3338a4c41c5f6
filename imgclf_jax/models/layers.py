"""Layers that models share: linen's parameters and results, computed in the form that is fast on the platform.

On CPU a model's images lie mirrored, [c, h, w, b], and layers are matrix products (`mirrored.py` says why). `mirror`
takes images there and back; between two layers the pair cancels, so the compiled program holds none. On GPU and TPU
images lie as [b, h, w, c] and a convolution is XLA's own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from imgclf_jax.models import mirrored

_FEW_TAPS = 27  # products an output: up to so many, convolution and pooling are one pass over the images


def on_mirrored() -> bool:
    """Whether layers compute on images [c, h, w, b]: on CPU."""
    return jax.default_backend() == "cpu"


def mirror(x: jax.Array) -> jax.Array:
    """[b, h, w, c] to [c, h, w, b], and back."""
    return jnp.swapaxes(x, 0, 3)


def inner(x: jax.Array) -> jax.Array:
    """Images [b, h, w, c] as layers compute on them, and back: mirrored on CPU, as they are elsewhere.

    Height and width are the axes 1 and 2 of both, so that a network may stay in it from first layer to last.
    """
    return mirror(x) if on_mirrored() else x


def channel_axis() -> int:
    """Which axis of `inner` images the channels are."""
    return 0 if on_mirrored() else 3


def widen(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 if it is: what element-wise operations compute in, whatever lies in memory."""
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
        place = ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0))
        x = lax.pad(x, jnp.zeros((), x.dtype), place)
        ho, wo = ((n - e) // s + 1 for n, e, s in zip(x.shape[1:3], extent, strides, strict=True))
        return mirrored.conv(x, kernel, strides, (ho, wo), dtype)
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
            x = inner(x)
        axis = channel_axis()
        shape = (*_pair(self.kernel_size), x.shape[axis] // self.feature_group_count, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        y = conv(
            x, kernel, self.strides, self.padding, self.kernel_dilation, self.feature_group_count, axis == 0, self.dtype
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
            y = y + (bias[:, None, None, None] if axis == 0 else bias)
        return y if self.inner else inner(y).astype(self.dtype)


class BatchNorm(nn.Module):
    """`nn.BatchNorm` on `inner` images: the same parameters, statistics and results, in float32 (or float64).

    Ioffe and Szegedy 2015 (arXiv:1502.03167), over all images of the batch, on however many devices they lie.
    `momentum` is the weight of the old running mean and variance, the collection `batch_stats`.
    """

    momentum: float = 0.99
    epsilon: float = 1e-5
    use_scale: bool = True
    scale_init: Callable[..., Any] = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x, axis = widen(x), channel_axis()
        shape = (x.shape[axis],)
        running = [
            self.variable("batch_stats", name, fill, shape) for name, fill in (("mean", jnp.zeros), ("var", jnp.ones))
        ]
        scale = self.param("scale", self.scale_init, shape) if self.use_scale else jnp.ones(shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        if not train:
            mean, var = (v.value for v in running)
            factor = lax.rsqrt(var + self.epsilon) * scale
            return x * _spread(factor, axis, x) + _spread(bias - mean * factor, axis, x)
        y, mean, var = _batch_norm(x, scale.astype(x.dtype), bias.astype(x.dtype), self.epsilon, axis)
        if not self.is_initializing():
            for old, new in zip(running, (mean, var), strict=True):
                old.value = self.momentum * old.value + (1 - self.momentum) * new.astype(old.value.dtype)
        return y


def _spread(values: jax.Array, axis: int, x: jax.Array) -> jax.Array:
    """[c] to [c, 1, 1, 1], or whichever axis of x [4 axes] the channels are, in x's dtype."""
    return values.astype(x.dtype).reshape([-1 if i == axis else 1 for i in range(4)])


def _channel_mean(x: jax.Array, axis: int) -> jax.Array:
    """Over all axes but the channels' → [c]; on CPU in two steps, the first of which runs along vectors."""
    if axis == 0:
        return jnp.mean(lax.optimization_barrier(jnp.mean(x, (1, 2))), 1)
    return jnp.mean(x, (0, 1, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(normalized x, mean [c], variance [c]), the latter two not differentiated."""
    return _batch_norm_forward(x, scale, bias, epsilon, axis)[0]


def _batch_norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis: int
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
    mean = _channel_mean(x, axis)
    var = jnp.maximum(_channel_mean(lax.square(x), axis) - lax.square(mean), 0)
    inverse = lax.rsqrt(var + epsilon)
    factor = inverse * scale
    y = x * _spread(factor, axis, x) + _spread(bias - mean * factor, axis, x)
    return (y, mean, var), (x, mean, inverse, scale)


def _batch_norm_backward(epsilon: float, axis: int, saved: Any, gradients: Any) -> tuple[jax.Array, ...]:
    """The paper's section 3, in two passes over the images."""
    x, mean, inverse, scale = saved
    gradient = gradients[0]
    count = x.size // x.shape[axis]
    mean_gradient = _channel_mean(gradient, axis)
    mean_product = _channel_mean(gradient * (x - _spread(mean, axis, x)), axis) * inverse  # of it and normalized x
    a = scale * inverse
    b = -a * mean_product * inverse
    c = -a * mean_gradient - b * mean
    d_x = gradient * _spread(a, axis, x) + x * _spread(b, axis, x) + _spread(c, axis, x)
    return d_x, mean_product * count, mean_gradient * count


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def pool_bias_relu(x: jax.Array, bias: jax.Array, window: int, dtype: Any) -> jax.Array:
    """relu(max_pool(x) + bias) in `dtype` of x [b, h, w, f], over windows that do not overlap.

    The same as `nn.relu(nn.max_pool(x + bias, …))`, since adding a constant is monotonic, with a quarter of the
    element-wise work. Its gradient is the same too: where several elements share the maximum the first one gets it. All
    that is kept for the gradient is the place of each maximum in its window: one byte an output.
    """
    return _pool_forward(x, bias, window, dtype)[0]


def _pool_forward(x: jax.Array, bias: jax.Array, window: int, dtype: Any) -> tuple[jax.Array, Any]:
    out, place = mirrored.pooled(mirrored.window_cells(x, window), bias, dtype)
    return out, (place, x[:0], bias[:0])


def _pool_backward(window: int, dtype: Any, saved: Any, gradient: jax.Array) -> tuple[Any, Any]:
    place, x, bias = saved  # of x and bias only shape and dtype
    d_x = mirrored.unpooled(place, gradient, window)
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
        if on_mirrored():
            few = k**2 * x.shape[-1] <= _FEW_TAPS
            conv_pool = mirrored.conv_pool_direct if few else mirrored.conv_pool
            return mirror(conv_pool(mirror(x), kernel, bias, window, self.dtype))
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
        if on_mirrored():
            y = mirrored.dense(mirror(x), kernel, self.dtype).T
        else:
            y = jnp.dot(x.reshape(b, -1).astype(self.dtype), kernel.astype(self.dtype))
        return (y + bias.astype(y.dtype)).astype(self.dtype)


def max_pool(x: jax.Array, window: int, strides: int, padding: int = 0) -> jax.Array:
    """The greatest value under each window of `inner` images; of equals the first gets the gradient.

    On CPU as maxima of strided slices: there the gradient of XLA's own is ten times slower.
    """
    if not on_mirrored():
        return nn.max_pool(x, (window, window), (strides, strides), [(padding, padding)] * 2)
    if strides == window and not padding:
        return mirrored.max_pool(x, window)
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
    mean = jnp.mean(widen(x), (1, 2)).astype(x.dtype)
    return mean.T if on_mirrored() else mean


def layer_norm(name: str, x: jax.Array) -> jax.Array:
    """`nn.LayerNorm` over the last axis (Ba et al. 2016, arXiv:1607.06450), epsilon 1e-6, computed in float32."""
    return nn.LayerNorm(1e-6, name=name)(widen(x)).astype(x.dtype)


def drop_path(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training x [b, …] is zero for a whole example.

    With probability `rate`, and scaled by 1 / (1 - rate) otherwise.
    """
    if not train or rate == 0:
        return x
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))

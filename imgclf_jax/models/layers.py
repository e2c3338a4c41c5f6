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
        inside = on_mirrored()
        y = conv(
            mirror(x) if inside else x, kernel, self.strides, self.padding, self.kernel_dilation,
            self.feature_group_count, inside, self.dtype,
        )  # fmt: skip
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
            y = y + (bias[:, None, None, None] if inside else bias)
        return (mirror(y) if inside else y).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def pool_bias_relu(x: jax.Array, bias: jax.Array, window: int, dtype: Any) -> jax.Array:
    """relu(max_pool(x) + bias) in `dtype` of x [b, h, w, f], over windows that do not overlap.

    The same as `nn.relu(nn.max_pool(x + bias, …))`, since adding a constant is monotonic, with a quarter of the
    element-wise work. Its gradient is the same too: where several elements share the maximum the first one gets it. All
    that is kept for the gradient is the place of each maximum in its window: one byte an output.
    """
    return _pool_forward(x, bias, window, dtype)[0]


def _pool_forward(x: jax.Array, bias: jax.Array, window: int, dtype: Any) -> tuple[jax.Array, Any]:
    b, h, w, f = x.shape
    ho, wo = h // window, w // window  # without the rest at the edges
    windows = x[:, : ho * window, : wo * window].reshape(b, ho, window, wo, window, f)
    cells = [windows[:, :, i, :, j] for i in range(window) for j in range(window)]
    out, place = mirrored.pooled(cells, bias, dtype)
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

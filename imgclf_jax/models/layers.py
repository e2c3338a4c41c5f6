"""Layers that models share: linen's parameters and results, computed in the form that is fast on the platform.

On CPU, XLA's convolution is slow (100 times slower inside a loop), and a matrix product near the machine's peak needs
long contiguous rows. So there a model's images lie mirrored, [c, h, w, b]: with the batch innermost, the patches of a
convolution are copies of whole rows, every element-wise operation runs over contiguous vectors, and the three products
of a convolution (forward, input gradient, weight gradient) have the layouts that the matrix library likes. `mirror`
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


def mirrored() -> bool:
    """Whether layers compute on images [c, h, w, b]: on CPU."""
    return jax.default_backend() == "cpu"


def mirror(x: jax.Array) -> jax.Array:
    """[b, h, w, c] to [c, h, w, b], and back."""
    return jnp.swapaxes(x, 0, 3)


def _patches(x: jax.Array, kernel: tuple[int, int], strides: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """[c, h, w, b] → [kh * kw * c, ho, wo, b]: under each output position, the inputs that its kernel sees."""
    (kh, kw), (sh, sw), (ho, wo) = kernel, strides, size
    c, b = x.shape[0], x.shape[3]
    corners = jnp.asarray([(i, j) for i in range(kh) for j in range(kw)])  # [kh * kw, 2]

    def seen(corner: jax.Array) -> jax.Array:
        extent = (c, (ho - 1) * sh + 1, (wo - 1) * sw + 1, b)
        return lax.dynamic_slice(x, (0, corner[0], corner[1], 0), extent)[:, ::sh, ::sw]  # [c, ho, wo, b]

    # One gather, which runs on all cores; the barriers keep XLA from computing the patches inside of the product that
    # reads them, many times over.
    x = lax.optimization_barrier(x)
    return lax.optimization_barrier(jax.vmap(seen)(corners)).reshape(kh * kw * c, ho, wo, b)


def _sum_patches(
    patches: jax.Array, shape: tuple[int, ...], kernel: tuple[int, int], strides: tuple[int, int], dtype: Any
) -> jax.Array:
    """The transpose of `_patches`, summed in `dtype`: [kh * kw * c, ho, wo, b] → `shape`, which is [c, h, w, b]."""
    (kh, kw), (sh, sw) = kernel, strides
    c, h, w, b = shape
    ho, wo = patches.shape[1:3]
    patches = patches.reshape(kh * kw, c, ho, wo, b)
    zero = jnp.zeros((), dtype)
    total = jnp.zeros(shape, dtype)
    for i in range(kh):
        for j in range(kw):
            below, right = h - i - (ho - 1) * sh - 1, w - j - (wo - 1) * sw - 1
            place = ((0, 0, 0), (i, below, sh - 1), (j, right, sw - 1), (0, 0, 0))
            total += lax.pad(patches[i * kw + j].astype(dtype), zero, place)
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv_mirrored(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], size: tuple[int, int], dtype: Any
) -> jax.Array:
    """The first `size` = (ho, wo) outputs of a "VALID" convolution, [c, h, w, b] and [kh, kw, c, f] → [f, ho, wo, b].

    As matrix products, whose operands are cast to `dtype`; the sums, and the result, are in float32 (float64 for
    float64).
    """
    return _conv_forward(x, kernel, strides, size, dtype)[0]


def _accumulator(dtype: Any) -> Any:
    return jnp.dtype(dtype if dtype == jnp.float64 else jnp.float32)


def _conv_forward(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], size: tuple[int, int], dtype: Any
) -> tuple[jax.Array, Any]:
    kh, kw, c, f = kernel.shape
    patches = _patches(x.astype(dtype), (kh, kw), strides, size)
    # Transposed outside of the product: XLA 0.12 cannot run a bfloat16 product whose left side it must transpose.
    weights = lax.optimization_barrier(kernel.astype(dtype).reshape(kh * kw * c, f).T)
    out = lax.dot_general(weights, patches, (((1,), (0,)), ((), ())), preferred_element_type=_accumulator(dtype))
    return out, (x, kernel)


def _conv_backward(
    strides: tuple[int, int], size: tuple[int, int], dtype: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    kh, kw, c, f = kernel.shape
    patches = _patches(x.astype(dtype), (kh, kw), strides, size)  # the forward pass's: XLA computes them once
    gradient = lax.optimization_barrier(gradient.astype(dtype))  # [f, ho, wo, b]
    positions = (((1, 2, 3), (1, 2, 3)), ((), ()))
    d_kernel = lax.dot_general(patches, gradient, positions, preferred_element_type=_accumulator(dtype))
    weights = kernel.astype(dtype).reshape(kh * kw * c, f)
    d_patches = lax.dot_general(weights, gradient, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
    d_x = _sum_patches(d_patches, x.shape, (kh, kw), strides, _accumulator(dtype))
    return lax.optimization_barrier(d_x.astype(x.dtype)), d_kernel.reshape(kernel.shape).astype(kernel.dtype)


conv_mirrored.defvjp(_conv_forward, _conv_backward)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[Any] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    mirrored: bool = False,
    dtype: Any = None,
) -> jax.Array:
    """The convolution (cross-correlation) of x [b, h, w, c] with kernel [kh, kw, c // groups, f] → [b, ho, wo, f].

    With `mirrored`, [c, h, w, b] → [f, ho, wo, b]; there a plain convolution is matrix products. Any other falls
    through to `lax.conv_general_dilated`. `padding` is "SAME", "VALID", a number, or one (before, after) a dimension;
    the operands are cast to `dtype` (default: x's), the result is in it or, from matrix products, in float32.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    strides, dilation = _pair(strides), _pair(dilation)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True)]
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:3], extent, strides, padding)
    else:
        each: Sequence[Any] = (padding, padding) if isinstance(padding, int) else padding
        pads = [_pair(p) for p in each]
    if mirrored and groups == 1 and dilation == (1, 1):
        place = ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0))
        x = lax.pad(x, jnp.zeros((), x.dtype), place)
        ho, wo = ((n - e) // s + 1 for n, e, s in zip(x.shape[1:3], extent, strides, strict=True))
        return conv_mirrored(x, kernel, strides, (ho, wo), dtype)
    names = "CHWN" if mirrored else "NHWC"
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
        inside = mirrored()
        y = conv(
            mirror(x) if inside else x, kernel, self.strides, self.padding, self.kernel_dilation,
            self.feature_group_count, inside, self.dtype,
        )  # fmt: skip
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
            y = y + (bias[:, None, None, None] if inside else bias)
        return (mirror(y) if inside else y).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def pool_bias_relu(x: jax.Array, bias: jax.Array, window: int, channels: int, dtype: Any) -> jax.Array:
    """relu(max_pool(x) + bias) in `dtype`, over windows that do not overlap: h and w, axes 1 and 2, shrink by `window`.

    `channels` is the axis that bias [f] belongs to: -1, or 0 for mirrored images. The same as `nn.relu(nn.max_pool(x +
    bias, …))`, since adding a constant is monotonic, with a quarter of the element-wise work. Its gradient is the same
    too: where several elements share the maximum the first one gets it. All that is kept for the gradient is the place
    of each maximum in its window, or -1 where ReLU gave zero: one byte an output.
    """
    return _pool_forward(x, bias, window, channels, dtype)[0]


def _whole_windows(x: jax.Array, window: int) -> jax.Array:
    """[n, h, w, m] → [n, ho, window, wo, window, m], without the rest at the edges."""
    n, h, w, m = x.shape
    ho, wo = h // window, w // window
    return x[:, : ho * window, : wo * window].reshape(n, ho, window, wo, window, m)


def _pool_forward(x: jax.Array, bias: jax.Array, window: int, channels: int, dtype: Any) -> tuple[jax.Array, Any]:
    cells = [(i, j) for i in range(window) for j in range(window)]
    slices = [_whole_windows(x, window)[:, :, i, :, j] for i, j in cells]
    maximum = functools.reduce(jnp.maximum, slices)  # [n, ho, wo, m]
    shape = [1, 1, 1, 1]
    shape[channels] = bias.size
    out = nn.relu(maximum + bias.reshape(shape).astype(x.dtype))
    place = jnp.full(out.shape, len(cells) - 1, jnp.int8 if len(cells) <= 128 else jnp.int32)
    for k in reversed(range(len(cells) - 1)):
        place = jnp.where(slices[k] == maximum, jnp.asarray(k, place.dtype), place)
    place = jnp.where(out > 0, place, jnp.asarray(-1, place.dtype))
    out, place = lax.optimization_barrier((out.astype(dtype), place))  # or XLA finds the places anew, several times
    return out, (place, x[:0], bias[:0])


def _pool_backward(window: int, channels: int, dtype: Any, saved: Any, gradient: jax.Array) -> tuple[Any, Any]:
    place, x, bias = saved  # of x and bias only shape and dtype
    n, ho, wo, m = place.shape
    cell = jnp.arange(window**2, dtype=place.dtype).reshape(1, 1, window, 1, window, 1)
    own = place[:, :, None, :, None] == cell  # [n, ho, window, wo, window, m]
    d_x = jnp.where(own, gradient[:, :, None, :, None], jnp.zeros((), gradient.dtype))
    d_x = d_x.reshape(n, ho * window, wo * window, m)
    rest = ((0, 0), (0, x.shape[1] - ho * window), (0, x.shape[2] - wo * window), (0, 0))
    passed = jnp.where(place >= 0, gradient.astype(x.dtype), jnp.zeros((), x.dtype))
    axes = tuple(axis for axis in range(4) if axis != channels % 4)
    return jnp.pad(d_x, rest).astype(x.dtype), jnp.sum(passed, axes).astype(bias.dtype)


pool_bias_relu.defvjp(_pool_forward, _pool_backward)


class ConvPool(nn.Module):
    """Convolution ("VALID"), bias, ReLU, max-pool: [b, h, w, c] → [b, ~h/2, ~w/2, features] in `dtype`.

    On CPU what follows a bfloat16 convolution is in float32, since bfloat16 arithmetic is slow there.
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
        inside = mirrored()
        # Only the outputs that fill windows: those left over at the edges would be computed for nothing.
        k, window = self.kernel_size, self.window
        ho, wo = ((n - k + 1) // window * window for n in x.shape[1:3])
        if inside:
            y = conv_mirrored(mirror(x), kernel, (1, 1), (ho, wo), self.dtype)
        else:
            y = conv(x[:, : ho + k - 1, : wo + k - 1], kernel, padding="VALID", dtype=self.dtype)
        y = pool_bias_relu(y, bias, self.window, 0 if inside else -1, self.dtype)
        return mirror(y) if inside else y


def flatten(x: jax.Array) -> jax.Array:
    """[b, h, w, c] → [b, h * w * c], which for mirrored images moves whole rows of the batch."""
    if not mirrored():
        return x.reshape(x.shape[0], -1)
    return x.transpose(1, 2, 3, 0).reshape(-1, x.shape[0]).T

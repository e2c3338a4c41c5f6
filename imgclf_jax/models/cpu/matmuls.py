"""Convolutions on CPU, as matmuls (im2col) on feature-first arrays: [c, h, w, b] for images and [d, b] for features.

On CPU, XLA's convolutions and their gradients are slow, and a matmul reaches peak only with long contiguous rows. With
the batch innermost, im2col copies whole rows, element-wise operations vectorize, and no gradient transposes more than a
kernel. Layers still take and return [b, h, w, c] and [b, d]: XLA cancels the transposes between one and the next.

Matmul operands are in `dtype`, float32 or bfloat16 (or float64); sums accumulate in float32 (float64 for float64).
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from imgclf_jax.core import platform
from imgclf_jax.models.cpu.multilinear import multilinear

type Shaped = jax.Array | jax.ShapeDtypeStruct
type Pair = tuple[int, int]
type Pads = tuple[Pair, Pair]  # (top, bottom), (left, right)

_FEW_TAPS = 9  # of a kernel: as many as one of 3×3 has on one channel


def wants_features_first() -> bool:
    """Whether layers compute on feature-first arrays: in programs for CPU, except on oneDNN."""
    return platform.current() == "cpu" and not platform.uses_onednn()


def features_first(x: jax.Array) -> jax.Array:
    """Transposes [b, h, w, c] → [c, h, w, b], or [b, d] → [d, b]."""
    return x.transpose(3, 1, 2, 0) if x.ndim == 4 else x.T


features_last = features_first  # it is its own inverse


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """The accumulation dtype of matmuls with operands in `dtype`: float32, or float64 for float64."""
    return jnp.dtype(dtype if dtype == jnp.float64 else jnp.float32)


def _matmul(a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """[m, k] times [k, …] → [m, …] in `dtype`."""
    # A transpose inside of the matmul would be slow, and jaxlib 0.12 has none in bfloat16.
    a, b = lax.optimization_barrier((a, b))
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=dtype)


def _output_size(x: Shaped, kernel: Shaped, strides: Pair, pads: Pads, dilation: Pair) -> Pair:
    """(ho, wo) of the convolution of x [c, h, w, b] with [kh, kw, c, f]."""
    sizes = zip(x.shape[1:3], kernel.shape[:2], strides, pads, dilation, strict=True)
    ho, wo = ((n + low + high - (k - 1) * d - 1) // s + 1 for n, k, s, (low, high), d in sizes)
    return ho, wo


def _padded(x: jax.Array, kernel: Shaped, pads: Pads, dtype: DTypeLike) -> jax.Array:
    """x [c, h, w, b] in `dtype`, padded. What negative padding crops at the end stays, since no tap reads it."""
    edges = ((0, 0, 0), *((low, max(high, 0), 0) for low, high in pads), (0, 0, 0))
    x = lax.optimization_barrier(lax.pad(x.astype(dtype), jnp.zeros((), dtype), edges))
    if not _has_few_taps(kernel):
        return x
    # A gather of all rows, in order, puts each in one piece: XLA would leave x untransposed and read taps by strides.
    rows = x.reshape(-1, x.shape[3])
    return lax.optimization_barrier(rows.at[jnp.arange(len(rows))].get(mode="promise_in_bounds")).reshape(x.shape)


def _has_few_taps(kernel: Shaped) -> bool:
    """Whether an output sums so few inputs that the operation that reads it computes it faster than a matmul."""
    return math.prod(kernel.shape[:3]) <= _FEW_TAPS


def _im2col(x: jax.Array, kernel: Shaped, strides: Pair, pads: Pads, dilation: Pair, dtype: DTypeLike) -> jax.Array:
    """The patch of inputs under the kernel at each output position: [c, h, w, b] → [kh * kw * c, ho, wo, b]."""
    (kh, kw), (sh, sw), (c, _, _, b) = kernel.shape[:2], strides, x.shape
    ho, wo = _output_size(x, kernel, strides, pads, dilation)
    x = _padded(x, kernel, pads, dtype)
    if (kh, kw) == (1, 1):
        return x[:, : (ho - 1) * sh + 1 : sh, : (wo - 1) * sw + 1 : sw]
    corners = jnp.asarray([(i * dilation[0], j * dilation[1]) for i in range(kh) for j in range(kw)])  # [kh * kw, 2]

    def slice_at(corner: jax.Array) -> jax.Array:
        extent = (c, (ho - 1) * sh + 1, (wo - 1) * sw + 1, b)
        return lax.dynamic_slice(x, (0, corner[0], corner[1], 0), extent)[:, ::sh, ::sw]  # [c, ho, wo, b]

    # vmap makes one gather, which runs on all cores.
    return lax.optimization_barrier(jax.vmap(slice_at)(corners)).reshape(kh * kw * c, ho, wo, b)


def _conv(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads, dilation: Pair, dtype: DTypeLike) -> jax.Array:
    """Convolution, [c, h, w, b] and [kh, kw, c, f] → [f, ho, wo, b] in float32 (float64 for float64).

    Negative padding crops.
    """
    wide = accumulator(dtype)
    if not _has_few_taps(kernel):
        weights = kernel.astype(dtype).reshape(-1, kernel.shape[3]).T  # [f, kh * kw * c]
        return _matmul(weights, _im2col(x, kernel, strides, pads, dilation, dtype), wide)
    ho, wo = _output_size(x, kernel, strides, pads, dilation)
    # Without a matmul nothing gains by bfloat16 operands, and their rounding would be the layer's largest error.
    x, kernel, total = _padded(x, kernel, pads, wide), kernel.astype(wide), jnp.zeros((), wide)
    for i, j, c in np.ndindex(kernel.shape[:3]):
        seen = x[c, i * dilation[0] :: strides[0], j * dilation[1] :: strides[1]][:ho, :wo]  # [ho, wo, b]
        total += kernel[i, j, c, :, None, None, None] * seen
    return total


def _conv_images(
    gradient: jax.Array, kernel: jax.Array, like: jax.ShapeDtypeStruct, strides: Pair, pads: Pads, dilation: Pair,
    dtype: DTypeLike,
) -> jax.Array:  # fmt: skip
    """The gradient of x [c, h, w, b] from that of the outputs [f, ho, wo, b]: the transpose of `_im2col` (col2im)."""
    (kh, kw, c, f), wide, (ho, wo, b) = kernel.shape, accumulator(dtype), gradient.shape[1:]
    patches = _matmul(kernel.astype(dtype).reshape(-1, f), gradient.astype(dtype), dtype).reshape(kh, kw, c, ho, wo, b)
    total = jnp.zeros(like.shape, wide)
    for taps in itertools.product(range(kh), range(kw)):
        around = [
            (tap * d - low, n - tap * d + low - (m - 1) * s - 1, s - 1)
            for tap, d, (low, _), n, m, s in zip(taps, dilation, pads, like.shape[1:3], (ho, wo), strides, strict=True)
        ]
        total += lax.pad(patches[taps].astype(wide), jnp.zeros((), wide), ((0, 0, 0), *around, (0, 0, 0)))
    return lax.optimization_barrier(total)


def _conv_kernel(
    x: jax.Array, gradient: jax.Array, like: Shaped, strides: Pair, pads: Pads, dilation: Pair, dtype: DTypeLike
) -> jax.Array:
    """The gradient of the kernel [kh, kw, c, f], from the gradient of the outputs [f, ho, wo, b]."""
    gradient = gradient.astype(dtype)
    even = gradient.shape[1] % 2 == gradient.shape[2] % 2 == 0
    if even and (strides, dilation) == ((1, 1), (1, 1)) and _has_few_taps(like):
        return _conv_kernel_by_blocks(x, gradient, like, pads, dtype)
    patches = _im2col(x, like, strides, pads, dilation, dtype)  # CSE merges it with the forward pass's
    return _contract_positions(patches, gradient).reshape(like.shape)


def _conv_kernel_by_blocks(x: jax.Array, gradient: jax.Array, like: Shaped, pads: Pads, dtype: DTypeLike) -> jax.Array:
    """The gradient of a kernel of few taps from 2×2 blocks of outputs, whose matmul is four times as wide.

    A block sees (kh + 1, kw + 1) inputs, and its output (i, j) those from (i, j) on.
    """
    (kh, kw, c, f), corners = like.shape, list(np.ndindex(2, 2))
    gradient = jnp.concatenate([gradient[:, i::2, j::2] for i, j in corners])  # [4 * f, ho / 2, wo / 2, b]
    patches = _im2col(x, jax.ShapeDtypeStruct((kh + 1, kw + 1, c, f), dtype), (2, 2), pads, (1, 1), dtype)
    sums = _contract_positions(gradient, patches).reshape(4, f, kh + 1, kw + 1, c)
    parts = [sums[k, :, i : i + kh, j : j + kw] for k, (i, j) in enumerate(corners)]
    return functools.reduce(jnp.add, parts).transpose(1, 2, 3, 0)


def _contract_positions(x: jax.Array, y: jax.Array) -> jax.Array:
    """The matmul [m, ho, wo, b] times [n, ho, wo, b] → [m, n], over all positions and images."""
    x, y = lax.optimization_barrier((x, y))
    positions, wide = (((1, 2, 3), (1, 2, 3)), ((), ())), accumulator(x.dtype)
    return lax.optimization_barrier(lax.dot_general(x, y, positions, preferred_element_type=wide))


# Called with `strides=`, `pads=`, `dilation=` and `dtype=`.
conv = multilinear("conv", _conv, _conv_images, _conv_kernel)

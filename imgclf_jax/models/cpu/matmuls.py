"""Convolutions and dense layers on CPU, as matmuls (im2col) on feature-first arrays.

On CPU, XLA's convolutions and their gradients are slow, and a matmul reaches peak only with long contiguous rows and
untransposed operands [m, k] and [k, n]. On images [c, h, w, b], with the batch innermost, im2col copies whole rows into
the order that the forward matmul and the kernel gradient need, and element-wise operations vectorize. The backward pass
transposes the outputs' gradient once, [f, ho, wo, b] → [ho, wo, b, f], which suits both of its matmuls.

Matmul operands are in `dtype`, float32 or bfloat16 (or float64); sums accumulate in float32 (float64 for float64).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from imgclf_jax.models.cpu.layout import accumulator, contiguous
from imgclf_jax.models.cpu.multilinear import multilinear

# Dimension numbers: [m, k] and [k, …] → [m, …], and [ho, wo, b, k] and [k, n] → [ho, wo, b, n].
_FIRST, _LAST = (((1,), (0,)), ((), ())), (((3,), (0,)), ((), ()))

_FEW_CHANNELS = 32  # with at most this many channels in and out, one patch serves several outputs

type Shaped = jax.Array | jax.ShapeDtypeStruct
type Pads = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)


def wants_channels_last(dtype: DTypeLike) -> bool:
    """Whether backward matmuls gain more from a channels-last gradient than the transpose costs: in bfloat16."""
    return dtype == jnp.bfloat16


def _matmul(a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """[m, k] times [k, …] → [m, …] in `dtype`."""
    return lax.dot_general(a, b, _FIRST, preferred_element_type=dtype)


def channels_last(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """[f, ho, wo, b] → [ho, wo, b, f] in `dtype`, transposed in memory only if `wants_channels_last`."""
    x = x.astype(dtype).transpose(1, 2, 3, 0)
    return contiguous(x) if wants_channels_last(dtype) else x


def im2col(x: jax.Array, kernel: tuple[int, int], strides: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """The patch of inputs under the kernel at each output position: [c, h, w, b] → [kh * kw * c, ho, wo, b]."""
    (kh, kw), (sh, sw), (ho, wo) = kernel, strides, size
    c, b = x.shape[0], x.shape[3]
    if (kh, kw) == (1, 1):
        return x[:, : (ho - 1) * sh + 1 : sh, : (wo - 1) * sw + 1 : sw]
    corners = jnp.asarray([(i, j) for i in range(kh) for j in range(kw)])  # [kh * kw, 2]
    x = contiguous(x)

    def slice_at(corner: jax.Array) -> jax.Array:
        extent = (c, (ho - 1) * sh + 1, (wo - 1) * sw + 1, b)
        return lax.dynamic_slice(x, (0, corner[0], corner[1], 0), extent)[:, ::sh, ::sw]  # [c, ho, wo, b]

    # vmap makes one gather, which runs on all cores.
    return lax.optimization_barrier(jax.vmap(slice_at)(corners)).reshape(kh * kw * c, ho, wo, b)


def _col2im(patches: jax.Array, size: tuple[int, int], strides: tuple[int, int], dtype: DTypeLike) -> jax.Array:
    """The transpose of `im2col`, summed in `dtype`: [ho, wo, b, kh, kw, c] → [h, w, b, c] with `size` = (h, w)."""
    (h, w), (sh, sw) = size, strides
    ho, wo, b, kh, kw, c = patches.shape
    zero = jnp.zeros((), dtype)
    total = jnp.zeros((h, w, b, c), dtype)
    for i, j in itertools.product(range(kh), range(kw)):
        below, right = h - i - (ho - 1) * sh - 1, w - j - (wo - 1) * sw - 1
        padding = ((i, below, sh - 1), (j, right, sw - 1), (0, 0, 0), (0, 0, 0))
        total += lax.pad(patches[:, :, :, i, j].astype(dtype), zero, padding)
    return total


def input_gradient(
    gradient: jax.Array, weights: jax.Array, channels: int, size: tuple[int, int], extent: tuple[int, int],
    strides: tuple[int, int], dtype: DTypeLike,
) -> jax.Array:  # fmt: skip
    """The gradient of x [channels, *size, b].

    `gradient` is that of the outputs, from `channels_last`; `weights` [kh * kw * c, f] is the flattened kernel.
    """
    if wants_channels_last(dtype):
        d_patches = lax.dot_general(gradient, contiguous(weights.T), _LAST, preferred_element_type=dtype)
    else:
        d_patches = jnp.moveaxis(_matmul(weights, jnp.moveaxis(gradient, 3, 0), dtype), 0, 3)
    d_patches = d_patches.reshape(*gradient.shape[:3], *extent, channels)
    d_x = _col2im(d_patches, size, strides, accumulator(dtype)).astype(dtype)
    if wants_channels_last(dtype):
        d_x = contiguous(d_x)
    return contiguous(d_x.transpose(3, 0, 1, 2))


def kernel_gradient(patches: jax.Array, gradient: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The matmul over all positions, [k, ho, wo, b] and [ho, wo, b, f] → [k, f]."""
    positions = (((1, 2, 3), (0, 1, 2)), ((), ()))
    sums = lax.dot_general(patches, gradient, positions, preferred_element_type=accumulator(dtype))
    return lax.optimization_barrier(sums)  # or XLA merges a transpose of it into the matmul


def pad(x: jax.Array, pads: Pads, dtype: DTypeLike) -> jax.Array:
    """Zero-pads x [c, h, w, b] in `dtype`; negative padding crops."""
    padding = ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0))
    return lax.pad(x.astype(dtype), jnp.zeros((), dtype), padding)


def _block(kernel: jax.Array, strides: tuple[int, int]) -> tuple[int, int]:
    """The block of outputs (rows, columns) that one patch serves.

    With few channels the patches are many times larger than the images, and copying them costs more than the matmul. A
    patch for 2×2 outputs of a 3×3 kernel has 16 taps instead of 9: 4/9 of the copies for 16/9 of the multiply-adds.
    """
    kh, kw, c, f = kernel.shape
    return (2, 2) if max(c, f) <= _FEW_CHANNELS and strides == (1, 1) and kh * kw > 1 else (1, 1)


def _block_kernel(kernel: jax.Array, block: tuple[int, int]) -> jax.Array:
    """Shifts the kernel to each output of a block: [kh, kw, c, f] → [kh + th - 1, kw + tw - 1, c, th, tw, f]."""
    kh, kw, c, f = kernel.shape
    th, tw = block
    if block == (1, 1):
        return kernel[:, :, :, None, None]
    weights = jnp.zeros((kh + th - 1, kw + tw - 1, c, th, tw, f), kernel.dtype)
    for i, j in itertools.product(range(th), range(tw)):
        weights = weights.at[i : i + kh, j : j + kw, :, i, j].set(kernel)
    return weights


def _block_patches(x: jax.Array, kernel: Shaped, strides: tuple[int, int], block: tuple[int, int]) -> jax.Array:
    """Patches of padded x [c, h, w, b] for blocks: [k, ceil(ho / th), ceil(wo / tw), b]; excess outputs see zeros."""
    extent = (kernel.shape[0] + block[0] - 1, kernel.shape[1] + block[1] - 1)
    size = _output_size(x, kernel, strides)
    blocks = tuple(-(-n // t) for n, t in zip(size, block, strict=True))
    missing = [(0, m * t - n) for m, n, t in zip(blocks, size, block, strict=True)]
    block_strides = (block[0] * strides[0], block[1] * strides[1])
    return im2col(pad(x, (missing[0], missing[1]), x.dtype), extent, block_strides, (blocks[0], blocks[1]))


def _output_size(x: jax.Array, kernel: Shaped, strides: tuple[int, int]) -> tuple[int, int]:
    ho, wo = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], kernel.shape[:2], strides, strict=True))
    return ho, wo


def _conv_padded(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], block: tuple[int, int]) -> jax.Array:
    """The convolution of padded x [c, h, w, b] with a kernel of the same dtype → [f, ho, wo, b]."""
    (th, tw), (ho, wo), f, b = block, _output_size(x, kernel, strides), kernel.shape[3], x.shape[3]
    patches = _block_patches(x, kernel, strides, block)
    # Transposed outside the matmul: XLA 0.12 cannot run a bfloat16 matmul whose left operand it must transpose.
    weights = contiguous(_block_kernel(kernel, block).reshape(-1, th * tw * f).T)
    y = _matmul(weights, patches, accumulator(x.dtype))
    if block == (1, 1):
        return y
    y = lax.optimization_barrier(y).reshape(th, tw, f, *patches.shape[1:3], b)
    y = y.transpose(2, 3, 0, 4, 1, 5).reshape(f, th * y.shape[3], tw * y.shape[4], b)
    return contiguous(y[:, :ho, :wo])  # or every consumer reassembles the blocks


type Block = tuple[int, int]


def _conv(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, block: Block, dtype: DTypeLike
) -> jax.Array:
    return _conv_padded(pad(x, pads, dtype), kernel.astype(dtype), strides, block)


def _conv_images(
    gradient: jax.Array, kernel: jax.Array, like: jax.ShapeDtypeStruct, strides: tuple[int, int], pads: Pads,
    block: Block, dtype: DTypeLike,
) -> jax.Array:  # fmt: skip
    """The gradient of x, from the gradient of the outputs [f, ho, wo, b]."""
    (kh, kw, c, f), (top, bottom), (left, right) = kernel.shape, *pads
    if block == (1, 1):
        size = (like.shape[1] + top + bottom, like.shape[2] + left + right)
        weights = kernel.astype(dtype).reshape(kh * kw * c, f)
        d_x = input_gradient(channels_last(gradient, dtype), weights, c, size, (kh, kw), strides, dtype)
        return pad(d_x, ((-top, -bottom), (-left, -right)), like.dtype)
    # As a convolution of the outputs' gradient with the flipped kernel, which needs no col2im.
    top, left = kh - 1 - top, kw - 1 - left
    bottom, right = (like.shape[i] - gradient.shape[i] + kernel.shape[i - 1] - 1 for i in (1, 2))
    around = pad(gradient, ((top, bottom - top), (left, right - left)), dtype)
    flipped = kernel[::-1, ::-1].swapaxes(2, 3).astype(dtype)
    return _conv_padded(around, flipped, (1, 1), block)


def _conv_kernel(
    x: jax.Array, gradient: jax.Array, like: Shaped, strides: tuple[int, int], pads: Pads, block: Block,
    dtype: DTypeLike,
) -> jax.Array:  # fmt: skip
    """The gradient of the kernel, from the gradient of the outputs [f, ho, wo, b]."""
    padded = pad(x, pads, dtype)
    if block != (1, 1):
        return _block_kernel_gradient(padded, like, block, gradient.astype(dtype))
    patches = _block_patches(padded, like, strides, (1, 1))  # CSE merges it with the forward pass's
    return kernel_gradient(patches, channels_last(gradient, dtype), dtype).reshape(like.shape)


_conv_product = multilinear("conv", _conv, _conv_images, _conv_kernel)


def conv(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, dtype: DTypeLike, one_output: bool = False
) -> jax.Array:
    """Convolution, [c, h, w, b] and [kh, kw, c, f] → [f, ho, wo, b] in float32 (float64 for float64).

    `pads` are ((top, bottom), (left, right)); negative padding crops. With `one_output` each patch serves one output
    even for few channels, which is faster if max pooling follows.
    """
    block = (1, 1) if one_output else _block(kernel, strides)
    return _conv_product(x, kernel, strides=strides, pads=pads, block=block, dtype=jnp.dtype(dtype))


def _block_kernel_gradient(x: jax.Array, kernel: Shaped, block: tuple[int, int], gradient: jax.Array) -> jax.Array:
    """The kernel gradient [kh, kw, c, f] with blocks and stride 1, from padded x and the gradient [f, ho, wo, b]."""
    (kh, kw, c, f), (th, tw), dtype = kernel.shape, block, x.dtype
    patches = _block_patches(x, kernel, (1, 1), block)  # CSE merges it with the forward pass's
    _, rows, columns, b = patches.shape
    missing = ((0, rows * th - gradient.shape[1]), (0, columns * tw - gradient.shape[2]))
    blocks = pad(gradient, missing, dtype).reshape(f, rows, th, columns, tw, b)
    transposed = blocks.transpose(1, 3, 5, 2, 4, 0).reshape(rows, columns, b, th * tw * f)
    sums = kernel_gradient(patches, contiguous(transposed) if wants_channels_last(dtype) else transposed, dtype)
    sums = sums.reshape(kh + th - 1, kw + tw - 1, c, th, tw, f)
    offsets = itertools.product(range(th), range(tw))
    return functools.reduce(jnp.add, [sums[i : i + kh, j : j + kw, :, i, j] for i, j in offsets])


def _flat_dense(x: jax.Array, kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
    c, h, w, b = x.shape
    weights = kernel.astype(dtype).reshape(h, w, c, -1).transpose(3, 2, 0, 1).reshape(-1, c * h * w)
    y = _matmul(contiguous(weights), x.astype(dtype).reshape(-1, b), accumulator(dtype))
    return lax.optimization_barrier(y)


def _flat_dense_images(
    gradient: jax.Array, kernel: jax.Array, like: jax.ShapeDtypeStruct, dtype: DTypeLike
) -> jax.Array:
    c, h, w, b = like.shape
    transposed = contiguous(gradient.astype(dtype).T)  # [b, d]
    d_x = _matmul(transposed, contiguous(kernel.astype(dtype).T), dtype).reshape(b, h, w, c)
    return jnp.swapaxes(d_x, 0, 3)


def _flat_dense_kernel(x: jax.Array, gradient: jax.Array, like: jax.ShapeDtypeStruct, dtype: DTypeLike) -> jax.Array:
    c, h, w, b = x.shape
    transposed = contiguous(gradient.astype(dtype).T)  # [b, d]
    d_kernel = _matmul(x.astype(dtype).reshape(-1, b), transposed, accumulator(dtype))
    return d_kernel.reshape(c, h, w, -1).transpose(1, 2, 0, 3).reshape(like.shape)


_flat_dense_product = multilinear("flat_dense", _flat_dense, _flat_dense_images, _flat_dense_kernel)


def flat_dense(x: jax.Array, kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Flattened images times the kernel, [c, h, w, b] and [h * w * c, d] → [d, b] in float32 (or float64)."""
    return _flat_dense_product(x, kernel, dtype=jnp.dtype(dtype))


def _dense(x: jax.Array, kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
    y = _matmul(contiguous(kernel.astype(dtype).T), x.astype(dtype).reshape(x.shape[0], -1), accumulator(dtype))
    return y.reshape(-1, *x.shape[1:])


def _dense_inputs(gradient: jax.Array, kernel: jax.Array, like: jax.ShapeDtypeStruct, dtype: DTypeLike) -> jax.Array:
    gradient = gradient.astype(dtype).reshape(gradient.shape[0], -1)
    return _matmul(kernel.astype(dtype), gradient, accumulator(dtype)).reshape(like.shape)


def _dense_kernel(x: jax.Array, gradient: jax.Array, like: jax.ShapeDtypeStruct, dtype: DTypeLike) -> jax.Array:
    transposed = gradient.astype(dtype).reshape(gradient.shape[0], -1).T
    transposed = contiguous(transposed) if wants_channels_last(dtype) else transposed
    return lax.optimization_barrier(_matmul(x.astype(dtype).reshape(x.shape[0], -1), transposed, accumulator(dtype)))


_dense_product = multilinear("dense", _dense, _dense_inputs, _dense_kernel)


def dense(x: jax.Array, kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Feature-first matmul, [d, …] and [d, f] → [f, …] in float32 (float64 for float64)."""
    return _dense_product(x, kernel, dtype=jnp.dtype(dtype))

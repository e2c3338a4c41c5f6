"""Convolutions and dense layers on CPU, as matrix products on arrays whose features come first.

There XLA's convolution and its gradients are slow, and a matrix product is near the machine's peak only where rows are
long, contiguous, and in the order that its library wants: the left side [m, k], the right side [k, n], neither
transposed. On images [c, h, w, b], with the batch innermost, the patches of a convolution are copies of whole rows, in
the order that the forward product and the kernel's gradient want; element-wise operations run over contiguous vectors.
For the gradients the outputs' gradient is turned once, [f, ho, wo, b] → [ho, wo, b, f], after which both products have
their order too.

Products have operands in `dtype`, float32 or bfloat16 (or float64), and sums in float32 (float64 for float64).
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from imgclf_jax.models.cpu.layout import accumulator, contiguous
from imgclf_jax.models.cpu.multilinear import multilinear

# The dimension numbers of [m, k] and [k, …] → [m, …], and of [ho, wo, b, k] and [k, n] → [ho, wo, b, n].
_FIRST, _LAST = (((1,), (0,)), ((), ())), (((3,), (0,)), ((), ()))

_FEW_CHANNELS = 32  # in and out: up to so many, a patch is for several outputs

Pads = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)


def wants_rows(dtype: Any) -> bool:
    """Whether the gradients' products are faster on `rows` by more than it costs to turn them: in bfloat16."""
    return dtype == jnp.bfloat16


def _product(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """[m, k] times [k, …] → [m, …] in `dtype`."""
    return lax.dot_general(a, b, _FIRST, preferred_element_type=dtype)


def rows(x: jax.Array, dtype: Any) -> jax.Array:
    """[f, ho, wo, b] → [ho, wo, b, f] in `dtype`: turned in memory where products want it, else in name only."""
    x = x.astype(dtype).transpose(1, 2, 3, 0)
    return contiguous(x) if wants_rows(dtype) else x


def patches(x: jax.Array, kernel: tuple[int, int], strides: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """[c, h, w, b] → [kh * kw * c, ho, wo, b]: under each output position, the inputs that its kernel sees."""
    (kh, kw), (sh, sw), (ho, wo) = kernel, strides, size
    c, b = x.shape[0], x.shape[3]
    if (kh, kw) == (1, 1):
        return x[:, : (ho - 1) * sh + 1 : sh, : (wo - 1) * sw + 1 : sw]
    corners = jnp.asarray([(i, j) for i in range(kh) for j in range(kw)])  # [kh * kw, 2]
    x = contiguous(x)

    def seen(corner: jax.Array) -> jax.Array:
        extent = (c, (ho - 1) * sh + 1, (wo - 1) * sw + 1, b)
        return lax.dynamic_slice(x, (0, corner[0], corner[1], 0), extent)[:, ::sh, ::sw]  # [c, ho, wo, b]

    # One gather, which runs on all cores.
    return lax.optimization_barrier(jax.vmap(seen)(corners)).reshape(kh * kw * c, ho, wo, b)


def _sum_patches(patches: jax.Array, size: tuple[int, int], strides: tuple[int, int], dtype: Any) -> jax.Array:
    """The transpose of `patches`, summed in `dtype`: [ho, wo, b, kh, kw, c] → [h, w, b, c], (h, w) being `size`."""
    (h, w), (sh, sw) = size, strides
    ho, wo, b, kh, kw, c = patches.shape
    zero = jnp.zeros((), dtype)
    total = jnp.zeros((h, w, b, c), dtype)
    for i, j in itertools.product(range(kh), range(kw)):
        below, right = h - i - (ho - 1) * sh - 1, w - j - (wo - 1) * sw - 1
        place = ((i, below, sh - 1), (j, right, sw - 1), (0, 0, 0), (0, 0, 0))
        total += lax.pad(patches[:, :, :, i, j].astype(dtype), zero, place)
    return total


def input_gradient(
    gradient: jax.Array,
    weights: jax.Array,
    channels: int,
    size: tuple[int, int],
    extent: tuple[int, int],
    strides: tuple[int, int],
    dtype: Any,
) -> jax.Array:
    """Of x [channels, *size, b], from that of the outputs, `rows`, and weights [kh * kw * c, f] for patches of x."""
    if wants_rows(dtype):
        d_patches = lax.dot_general(gradient, contiguous(weights.T), _LAST, preferred_element_type=dtype)
    else:
        d_patches = jnp.moveaxis(_product(weights, jnp.moveaxis(gradient, 3, 0), dtype), 0, 3)
    d_patches = d_patches.reshape(*gradient.shape[:3], *extent, channels)
    d_x = _sum_patches(d_patches, size, strides, accumulator(dtype)).astype(dtype)
    if wants_rows(dtype):
        d_x = contiguous(d_x)
    return contiguous(d_x.transpose(3, 0, 1, 2))


def kernel_gradient(patches: jax.Array, gradient: jax.Array, dtype: Any) -> jax.Array:
    """[k, ho, wo, b] and [ho, wo, b, f] → [k, f], the product summed over all positions."""
    positions = (((1, 2, 3), (0, 1, 2)), ((), ()))
    sums = lax.dot_general(patches, gradient, positions, preferred_element_type=accumulator(dtype))
    return lax.optimization_barrier(sums)  # or XLA merges a transpose of it into the product


def pad(x: jax.Array, pads: Pads, dtype: Any) -> jax.Array:
    """x [c, h, w, b] in `dtype`, with zeros around it; a negative number cuts rows or columns off."""
    place = ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0))
    return lax.pad(x.astype(dtype), jnp.zeros((), dtype), place)


def _block(kernel: jax.Array, strides: tuple[int, int]) -> tuple[int, int]:
    """How many outputs, down and across, one patch serves.

    Patches of few channels are many times the images, and copying them takes longer than the products. A patch for four
    outputs, sixteen taps instead of nine, is four ninths of the copies for 16 / 9 of the products.
    """
    kh, kw, c, f = kernel.shape
    return (2, 2) if max(c, f) <= _FEW_CHANNELS and strides == (1, 1) and kh * kw > 1 else (1, 1)


def _block_kernel(kernel: jax.Array, block: tuple[int, int]) -> jax.Array:
    """[kh, kw, c, f] → [kh + th - 1, kw + tw - 1, c, th, tw, f]: the kernel where each output of a block has it."""
    kh, kw, c, f = kernel.shape
    th, tw = block
    if block == (1, 1):
        return kernel[:, :, :, None, None]
    weights = jnp.zeros((kh + th - 1, kw + tw - 1, c, th, tw, f), kernel.dtype)
    for i, j in itertools.product(range(th), range(tw)):
        weights = weights.at[i : i + kh, j : j + kw, :, i, j].set(kernel)
    return weights


def _block_patches(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], block: tuple[int, int]) -> jax.Array:
    """x [c, h, w, b], padded → [k, ho / th, wo / tw, b], rounded up; outputs that x is too small for see zeros."""
    extent = (kernel.shape[0] + block[0] - 1, kernel.shape[1] + block[1] - 1)
    size = _output_size(x, kernel, strides)
    columns = tuple(-(-n // t) for n, t in zip(size, block, strict=True))
    missing = [(0, m * t - n) for m, n, t in zip(columns, size, block, strict=True)]
    apart = (block[0] * strides[0], block[1] * strides[1])
    return patches(pad(x, (missing[0], missing[1]), x.dtype), extent, apart, (columns[0], columns[1]))


def _output_size(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> tuple[int, int]:
    ho, wo = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], kernel.shape[:2], strides, strict=True))
    return ho, wo


def outputs(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], block: tuple[int, int]) -> jax.Array:
    """The convolution of x [c, h, w, b], padded, both in the products' dtype → [f, ho, wo, b]."""
    (th, tw), (ho, wo), f, b = block, _output_size(x, kernel, strides), kernel.shape[3], x.shape[3]
    patches = _block_patches(x, kernel, strides, block)
    # Transposed outside of the product: XLA 0.12 cannot run a bfloat16 product whose left side it must transpose.
    weights = contiguous(_block_kernel(kernel, block).reshape(-1, th * tw * f).T)
    y = _product(weights, patches, accumulator(x.dtype))
    if block == (1, 1):
        return y
    y = lax.optimization_barrier(y).reshape(th, tw, f, *patches.shape[1:3], b)
    y = y.transpose(2, 3, 0, 4, 1, 5).reshape(f, th * y.shape[3], tw * y.shape[4], b)
    return contiguous(y[:, :ho, :wo])  # or all that reads it puts the blocks in their places anew


Block = tuple[int, int]


def _conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, block: Block, dtype: Any) -> jax.Array:
    return outputs(pad(x, pads, dtype), kernel.astype(dtype), strides, block)


def _conv_images(
    gradient: jax.Array, kernel: jax.Array, like: Any, strides: tuple[int, int], pads: Pads, block: Block, dtype: Any
) -> jax.Array:
    """The gradient of x, from that of the outputs [f, ho, wo, b]."""
    (kh, kw, c, f), (top, bottom), (left, right) = kernel.shape, *pads
    if block == (1, 1):
        size = (like.shape[1] + top + bottom, like.shape[2] + left + right)
        weights = kernel.astype(dtype).reshape(kh * kw * c, f)
        d_x = input_gradient(rows(gradient, dtype), weights, c, size, (kh, kw), strides, dtype)
        return pad(d_x, ((-top, -bottom), (-left, -right)), like.dtype)
    # The convolution of the outputs' gradient with the flipped kernel: no patches' gradients to compute and sum.
    top, left = kh - 1 - top, kw - 1 - left
    bottom, right = (like.shape[i] - gradient.shape[i] + kernel.shape[i - 1] - 1 for i in (1, 2))
    around = pad(gradient, ((top, bottom - top), (left, right - left)), dtype)
    flipped = kernel[::-1, ::-1].swapaxes(2, 3).astype(dtype)
    return outputs(around, flipped, (1, 1), block)


def _conv_kernel(
    x: jax.Array, gradient: jax.Array, like: Any, strides: tuple[int, int], pads: Pads, block: Block, dtype: Any
) -> jax.Array:
    """The gradient of the kernel, from that of the outputs [f, ho, wo, b]."""
    padded = pad(x, pads, dtype)
    if block != (1, 1):
        return _block_kernel_gradient(padded, like, block, gradient.astype(dtype))
    patches = _block_patches(padded, like, strides, (1, 1))  # the forward pass's, computed once
    return kernel_gradient(patches, rows(gradient, dtype), dtype).reshape(like.shape)


_conv_product = multilinear("conv", _conv, _conv_images, _conv_kernel)


def conv(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, dtype: Any, one_output: bool = False
) -> jax.Array:
    """The convolution [c, h, w, b] and [kh, kw, c, f] → [f, ho, wo, b] in float32 (float64 for float64).

    `pads` are the zeros before and behind, down and across; a negative number cuts off. With `one_output` a patch
    serves one output, however few the channels: that is faster where a max-pool follows.
    """
    block = (1, 1) if one_output else _block(kernel, strides)
    return _conv_product(x, kernel, strides=strides, pads=pads, block=block, dtype=jnp.dtype(dtype))


def _block_kernel_gradient(x: jax.Array, kernel: jax.Array, block: tuple[int, int], gradient: jax.Array) -> jax.Array:
    """[kh, kw, c, f] from x [c, h, w, b], padded, and [f, ho, wo, b], both in the products' dtype; of stride 1."""
    (kh, kw, c, f), (th, tw), dtype = kernel.shape, block, x.dtype
    patches = _block_patches(x, kernel, (1, 1), block)  # the forward pass's, computed once
    _, rows, columns, b = patches.shape
    missing = ((0, rows * th - gradient.shape[1]), (0, columns * tw - gradient.shape[2]))
    blocks = pad(gradient, missing, dtype).reshape(f, rows, th, columns, tw, b)
    turned = blocks.transpose(1, 3, 5, 2, 4, 0).reshape(rows, columns, b, th * tw * f)
    sums = kernel_gradient(patches, contiguous(turned) if wants_rows(dtype) else turned, dtype)
    sums = sums.reshape(kh + th - 1, kw + tw - 1, c, th, tw, f)
    places = itertools.product(range(th), range(tw))
    return functools.reduce(jnp.add, [sums[i : i + kh, j : j + kw, :, i, j] for i, j in places])


def _flat_dense(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    c, h, w, b = x.shape
    weights = kernel.astype(dtype).reshape(h, w, c, -1).transpose(3, 2, 0, 1).reshape(-1, c * h * w)
    y = _product(contiguous(weights), x.astype(dtype).reshape(-1, b), accumulator(dtype))
    return lax.optimization_barrier(y)


def _flat_dense_images(gradient: jax.Array, kernel: jax.Array, like: Any, dtype: Any) -> jax.Array:
    c, h, w, b = like.shape
    turned = contiguous(gradient.astype(dtype).T)  # [b, d]
    d_x = _product(turned, contiguous(kernel.astype(dtype).T), dtype).reshape(b, h, w, c)
    return jnp.swapaxes(d_x, 0, 3)


def _flat_dense_kernel(x: jax.Array, gradient: jax.Array, like: Any, dtype: Any) -> jax.Array:
    c, h, w, b = x.shape
    turned = contiguous(gradient.astype(dtype).T)  # [b, d]
    d_kernel = _product(x.astype(dtype).reshape(-1, b), turned, accumulator(dtype))
    return d_kernel.reshape(c, h, w, -1).transpose(1, 2, 0, 3).reshape(like.shape)


_flat_dense_product = multilinear("flat_dense", _flat_dense, _flat_dense_images, _flat_dense_kernel)


def flat_dense(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """The flattened image times the kernel, [c, h, w, b] and [h * w * c, d] → [d, b], in float32 (or float64)."""
    return _flat_dense_product(x, kernel, dtype=jnp.dtype(dtype))


def _dense(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    y = _product(contiguous(kernel.astype(dtype).T), x.astype(dtype).reshape(x.shape[0], -1), accumulator(dtype))
    return y.reshape(-1, *x.shape[1:])


def _dense_inputs(gradient: jax.Array, kernel: jax.Array, like: Any, dtype: Any) -> jax.Array:
    gradient = gradient.astype(dtype).reshape(gradient.shape[0], -1)
    return _product(kernel.astype(dtype), gradient, accumulator(dtype)).reshape(like.shape)


def _dense_kernel(x: jax.Array, gradient: jax.Array, like: Any, dtype: Any) -> jax.Array:
    turned = gradient.astype(dtype).reshape(gradient.shape[0], -1).T
    turned = contiguous(turned) if wants_rows(dtype) else turned
    return lax.optimization_barrier(_product(x.astype(dtype).reshape(x.shape[0], -1), turned, accumulator(dtype)))


_dense_product = multilinear("dense", _dense, _dense_inputs, _dense_kernel)


def dense(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """A dense layer on features that come first: [d, …] and [d, f] → [f, …], in float32 (float64 for float64)."""
    return _dense_product(x, kernel, dtype=jnp.dtype(dtype))

"""Convolution of [b, h, w, c] on CPU with gradients that oneDNN computes too.

XLA hands oneDNN a plain convolution, but neither its automatic derivatives nor anything inside a loop. Here every
gradient is written as plain convolutions and matmuls.

Operands are in `dtype`, and so are results. A kernel's gradient is at least float32, but with bfloat16 operands oneDNN
rounds it, or each part of its sum, to bfloat16 first.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from imgclf_jax.core import dtypes
from imgclf_jax.core.typing import Function
from imgclf_jax.models.cpu.matmuls import Pads, Pair, Shaped, accumulator
from imgclf_jax.models.cpu.multilinear import multilinear
from imgclf_jax.models.cpu.pool import interleave

_BLOCK = 16  # channels; see `_images_of_a_part`
_CACHED = 2**24  # bytes that stay in the caches


def _convolve(
    x: jax.Array, kernel: jax.Array, strides: Pair, pads: Sequence[Pair], dilation: Pair = (1, 1),
    dimensions: tuple[str, str, str] = ("NHWC", "HWIO", "NHWC"), groups: int = 1,
) -> jax.Array:  # fmt: skip
    """`lax.conv_general_dilated`; negative padding, which oneDNN lacks, crops first."""
    rows, columns = (dimensions[0].index(letter) for letter in "HW")
    crop = [(0, 0, 0)] * 4
    crop[rows], crop[columns] = ((min(low, 0), min(high, 0), 0) for low, high in pads)
    x = lax.pad(x, jnp.zeros((), x.dtype), crop)
    pads = [(max(low, 0), max(high, 0)) for low, high in pads]
    return lax.conv_general_dilated(
        x, lax.optimization_barrier(kernel), strides, pads, rhs_dilation=dilation, dimension_numbers=dimensions,
        feature_group_count=groups,
    )  # fmt: skip


def _groups(kernel: Shaped, x: Shaped) -> int:
    """The groups of a convolution of x with [kh, kw, c // groups, f]: one, or all channels for a depthwise one."""
    return x.shape[3] // kernel.shape[2]


def _conv(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads, dtype: DTypeLike) -> jax.Array:
    """Convolution, [b, h, w, c] and [kh, kw, c, f] → [b, ho, wo, f] in `dtype`; depthwise with [kh, kw, 1, c].

    Negative padding crops.
    """
    return _convolve(x.astype(dtype), kernel.astype(dtype), strides, pads, groups=_groups(kernel, x))


def _conv_images(
    gradient: jax.Array, kernel: jax.Array, like: jax.ShapeDtypeStruct, strides: Pair, pads: Pads, dtype: DTypeLike
) -> jax.Array:
    """The gradient of x [b, h, w, c] from that of the outputs [b, ho, wo, f], without multiplying by inserted zeros.

    Inputs at the same offset p modulo the stride s see the same taps u of the kernel: those with u = p + low mod s. So
    each offset is a convolution of its own with stride 1, and the results interleave.
    """
    gradient, kernel = lax.optimization_barrier(gradient.astype(dtype)), kernel.astype(dtype)
    if (groups := _groups(kernel, like)) == 1:
        kernel = kernel.swapaxes(2, 3)

    def taps(axis: int, offset: int) -> tuple[slice, Pair]:
        """The kernel's taps for an offset, and the padding of the gradient, along an axis."""
        k, s, low = kernel.shape[axis], strides[axis], pads[axis][0]
        first = (offset + low) % s
        count = len(range(first, k, s))
        shift = (offset + low - first) // s  # the input at s * i + offset sees output i + shift through the first tap
        before = count - 1 - shift
        inputs, outputs = -(-like.shape[1 + axis] // s), gradient.shape[1 + axis]
        return slice(first, k, s), (before, inputs - outputs + shift)

    def at(row: int, column: int) -> jax.Array:
        (rows, above), (columns, beside) = taps(0, row), taps(1, column)
        part = kernel[rows, columns]
        if part.size == 0:  # the kernel is smaller than the stride
            size = (-(-n // s) for n, s in zip(like.shape[1:3], strides, strict=True))
            return jnp.zeros((len(gradient), *size, like.shape[3]), dtype)
        return _convolve(gradient, part[::-1, ::-1], (1, 1), (above, beside), groups=groups)

    phases = [[at(row, column) for column in range(strides[1])] for row in range(strides[0])]
    return interleave(phases, like.shape)


def _conv_kernel(
    x: jax.Array, gradient: jax.Array, like: jax.ShapeDtypeStruct, strides: Pair, pads: Pads, dtype: DTypeLike
) -> jax.Array:
    """The gradient of the kernel [kh, kw, c, f], from the gradient of the outputs [b, ho, wo, f].

    It is a convolution of the images with the outputs' gradient as a kernel of ho by wo taps, in which channels are the
    batch and images the channels. For a 1×1 kernel it is a matmul.
    """
    (kh, kw), wide = like.shape[:2], accumulator(dtype)
    x, gradient = lax.optimization_barrier((x.astype(dtype), gradient.astype(dtype)))
    around = [
        (low, (m - 1) * s + k - n - low)
        for n, m, k, s, (low, _) in zip(x.shape[1:3], gradient.shape[1:3], (kh, kw), strides, pads, strict=True)
    ]
    if _groups(like, x) > 1:
        return _depthwise_kernel(x, gradient, strides, around)
    if (kh, kw) == (1, 1) and pads == ((0, 0), (0, 0)):
        seen = x[:, :: strides[0], :: strides[1]][:, : gradient.shape[1], : gradient.shape[2]]
        seen, gradient = (y.reshape(-1, y.shape[3]) for y in (seen, gradient))
        # With bfloat16 operands a float32 result is slow.
        product = lax.dot_general(seen, gradient, (((0,), (0,)), ((), ())))
        return product.astype(wide).reshape(like.shape)

    def of_part(x: jax.Array, gradient: jax.Array) -> jax.Array:
        permuted = ("CHWN", "IHWO", "NHWC")  # oneDNN takes no results with the batch elsewhere
        return _convolve(x, gradient, (1, 1), around, strides, permuted).astype(wide)

    return _sum_over_parts(of_part, _images_of_a_part(x, like), x, gradient).transpose(1, 2, 0, 3)


def _sum_over_parts(of_part: Function, images: int, x: jax.Array, gradient: jax.Array) -> jax.Array:
    """The sum of `of_part(x, gradient)` over parts of the batch of at least `images`, sharded as the batch is."""
    b = len(x)
    count = max(n for n in range(1, max(1, b // images) + 1) if b % n == 0)
    x, gradient = (y.reshape(-1, count, *y.shape[1:]) for y in (x, gradient))
    return functools.reduce(jnp.add, [of_part(x[:, i], gradient[:, i]) for i in range(count)])


def _images_of_a_part(x: jax.Array, kernel: Shaped) -> int:
    """The number of images of x [b, h, w, c] that together give a kernel's gradient.

    16 images, a block of oneDNN's channels, stay in the caches: 128 images of 56 by 56 pixels and 64 channels take a
    quarter of the time. Adding the parts' gradients costs more than it saves if the kernel is larger than a part, and
    in bfloat16 if the whole batch stays in the caches too.
    """
    whole = x.size * _BLOCK < kernel.size * len(x) or (x.dtype == jnp.bfloat16 and x.nbytes <= _CACHED)
    return len(x) if whole else _BLOCK


def _depthwise_kernel(x: jax.Array, gradient: jax.Array, strides: Pair, around: Sequence[Pair]) -> jax.Array:
    """The gradient of a depthwise kernel [kh, kw, 1, c]: a depthwise convolution by the outputs' gradient.

    This sums over no images: those of a part are side by side as channels, [1, h, w, b * c], their results are added.
    """
    c = x.shape[3]

    def of_part(x: jax.Array, gradient: jax.Array) -> jax.Array:
        pair = (y.transpose(1, 2, 0, 3).reshape(*y.shape[1:3], -1) for y in (x, gradient))
        images, windows = lax.optimization_barrier(tuple(pair))
        y = _convolve(images[None], windows[:, :, None], (1, 1), around, strides, groups=images.shape[2])
        return dtypes.upcast(y.reshape(*y.shape[1:3], -1, c)).sum(2)

    return _sum_over_parts(of_part, _BLOCK // 4, x, gradient)[:, :, None]  # [kh, kw, c] → [kh, kw, 1, c]


# Called with `strides=`, `pads=` and `dtype=`.
conv = multilinear("onednn_conv", _conv, _conv_images, _conv_kernel)

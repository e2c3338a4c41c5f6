"""Convolution of [b, h, w, c] on CPU with gradients that oneDNN computes too.

XLA hands oneDNN a plain convolution, but neither its automatic derivatives nor anything inside a loop. Here every
gradient is written as plain convolutions and matmuls. The barriers keep XLA from fusing these with their neighbours:
see `jaxprs.isolate_matmuls`, which does not look into primitives.

Operands are in `dtype`, and so are results. A kernel's gradient is at least float32, but with bfloat16 operands oneDNN
rounds it, or each part of its sum, to bfloat16 first.

`bind_matmul` computes wide dense layers as convolutions.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jax.typing import DTypeLike

from imgclf_jax.core.jaxprs import aval_of, bind
from imgclf_jax.models.cpu.layout import accumulator
from imgclf_jax.models.cpu.matmuls import Pads, Shaped
from imgclf_jax.models.cpu.multilinear import multilinear

_BLOCK = 16  # channels; see `_parts`
_CACHED = 2**24  # bytes that stay in the caches
_CACHED_BLOCK = 2**21  # bytes of a block of images that stay there while they are transposed

type _Pair = tuple[int, int]


def _convolve(
    x: jax.Array, kernel: jax.Array, strides: _Pair, pads: Sequence[_Pair], dilation: _Pair = (1, 1),
    dimensions: tuple[str, str, str] = ("NHWC", "HWIO", "NHWC"), groups: int = 1,
) -> jax.Array:  # fmt: skip
    """`lax.conv_general_dilated` apart from its neighbours; negative padding, which oneDNN lacks, crops first."""
    rows, columns = (dimensions[0].index(letter) for letter in "HW")
    crop = [(0, 0, 0)] * 4
    crop[rows], crop[columns] = ((min(low, 0), min(high, 0), 0) for low, high in pads)
    x = lax.pad(x, jnp.zeros((), x.dtype), crop)
    pads = [(max(low, 0), max(high, 0)) for low, high in pads]
    return lax.optimization_barrier(
        lax.conv_general_dilated(
            x, lax.optimization_barrier(kernel), strides, pads, rhs_dilation=dilation, dimension_numbers=dimensions,
            feature_group_count=groups,
        )
    )  # fmt: skip


def _groups(kernel: Shaped, x: Shaped) -> int:
    """The groups of a convolution of x with [kh, kw, c // groups, f]: one, or all channels for a depthwise one."""
    return x.shape[3] // kernel.shape[2]


def _conv(x: jax.Array, kernel: jax.Array, strides: _Pair, pads: Pads, dtype: DTypeLike) -> jax.Array:
    return _convolve(x.astype(dtype), kernel.astype(dtype), strides, pads, groups=_groups(kernel, x))


def _conv_images(
    gradient: jax.Array, kernel: jax.Array, like: jax.ShapeDtypeStruct, strides: _Pair, pads: Pads, dtype: DTypeLike
) -> jax.Array:
    """The gradient of x [b, h, w, c] from that of the outputs [b, ho, wo, f], without multiplying by inserted zeros.

    Inputs at the same offset p modulo the stride s see the same taps u of the kernel: those with u = p + low mod s. So
    each offset is a convolution of its own with stride 1, and the results interleave.
    """
    gradient, kernel = lax.optimization_barrier(gradient.astype(dtype)), kernel.astype(dtype)
    if (groups := _groups(kernel, like)) == 1:
        kernel = kernel.swapaxes(2, 3)

    def taps(axis: int, offset: int) -> tuple[slice, _Pair]:
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


def interleave(phases: Sequence[Sequence[jax.Array]], shape: tuple[int, ...]) -> jax.Array:
    """Arranges y[p][q] [b, n, m, c] to [b, s * n, t * m, c], where row s * i + p, column t * j + q is y[p][q][i, j].

    Then crops to `shape`.
    """
    if len(phases) == len(phases[0]) == 1:
        return phases[0][0][:, : shape[1], : shape[2]]
    y = jnp.stack([jnp.stack(row, 3) for row in phases], 2)  # [b, n, s, m, t, c]
    b, n, s, m, t, c = y.shape
    return lax.optimization_barrier(y.reshape(b, n * s, m * t, c)[:, : shape[1], : shape[2]])


def _conv_kernel(
    x: jax.Array, gradient: jax.Array, like: jax.ShapeDtypeStruct, strides: _Pair, pads: Pads, dtype: DTypeLike
) -> jax.Array:
    """The gradient of the kernel [kh, kw, c, f], from the gradient of the outputs [b, ho, wo, f].

    It is a convolution of the images with the outputs' gradient as a kernel of ho by wo taps, in which channels are the
    batch and images the channels, unless the images are large. For a 1×1 kernel it is a matmul.
    """
    (kh, kw), wide = like.shape[:2], accumulator(dtype)
    x, gradient = lax.optimization_barrier((x.astype(dtype), gradient.astype(dtype)))
    if _groups(like, x) > 1:
        return _depthwise_kernel(x, gradient, (kh, kw), strides, pads)
    if (kh, kw) == (1, 1) and pads == ((0, 0), (0, 0)):
        seen = x[:, :: strides[0], :: strides[1]][:, : gradient.shape[1], : gradient.shape[2]]
        seen, gradient = (y.reshape(-1, y.shape[3]) for y in (seen, gradient))
        # With bfloat16 operands a float32 result is slow.
        product = lax.dot_general(seen, gradient, (((0,), (0,)), ((), ())))
        return lax.optimization_barrier(product).astype(wide).reshape(like.shape)
    around = [
        (low, (m - 1) * s + k - n - low)
        for n, m, k, s, (low, _) in zip(x.shape[1:3], gradient.shape[1:3], (kh, kw), strides, pads, strict=True)
    ]
    if _has_large_images(x, like):
        return _large_images_kernel(x, gradient, like, strides, around)
    count = _parts(x, like)
    x, gradient = (y.reshape(-1, count, *y.shape[1:]) for y in (x, gradient))  # keeps the batch sharded
    permuted = ("CHWN", "IHWO", "NHWC")  # oneDNN takes no results with the batch elsewhere
    parts = [_convolve(x[:, i], gradient[:, i], (1, 1), around, strides, permuted) for i in range(count)]
    return functools.reduce(jnp.add, [part.astype(wide) for part in parts]).transpose(1, 2, 0, 3)


def _large_images_kernel(
    x: jax.Array, gradient: jax.Array, like: jax.ShapeDtypeStruct, strides: _Pair, around: Sequence[_Pair]
) -> jax.Array:
    """The gradient of the kernel [kh, kw, c, f] from large images, with the pixels of a row and channels on one axis.

    On this axis, [1, h, w * c, b], the taps of the outputs' gradient are c apart. So the transpose reads every image
    once. In the other form, with channels as the batch, it reads them once for each channel.
    """
    c, b, (rows, (left, right)) = x.shape[3], len(x), around
    count = _divisor(b, max(1, 2 * b // _BLOCK))  # of 8 images
    x = x.reshape(b, x.shape[1], -1)
    images, windows = (y.reshape(-1, count, *y.shape[1:]) for y in (x, gradient))  # keeps the batch sharded
    parts = []
    for i in range(count):
        part, window = images[:, i].transpose(1, 2, 0)[None], windows[:, i].transpose(1, 2, 0, 3)
        part, window = lax.optimization_barrier((part, window))
        parts.append(_convolve(part, window, (1, 1), (rows, (c * left, c * right)), (strides[0], c * strides[1])))
    return functools.reduce(jnp.add, parts).reshape(like.shape)  # from [1, kh, kw * c, f]


def _has_large_images(x: jax.Array, kernel: Shaped) -> bool:
    """Whether a block of the float32 images x [b, h, w, c] exceeds the caches, and is larger than the kernel."""
    block = x.size * _BLOCK // len(x)
    return x.dtype == jnp.float32 and block * x.itemsize > _CACHED_BLOCK and block >= kernel.size


def _divisor(b: int, most: int) -> int:
    """The greatest divisor of b up to `most`."""
    return max(n for n in range(1, most + 1) if b % n == 0)


def _parts(x: jax.Array, kernel: Shaped) -> int:
    """The number of parts of the batch x [b, h, w, c] that each give a kernel's gradient, to be added.

    Parts of 16 images, a block of oneDNN's channels, stay in the caches: 128 images of 56 by 56 pixels and 64 channels
    take a quarter of the time. Adding their gradients costs more than it saves if the kernel is larger than a part, and
    in bfloat16 if the whole batch stays in the caches too.
    """
    b = len(x)
    if x.size * _BLOCK < kernel.size * b or (x.dtype == jnp.bfloat16 and x.nbytes <= _CACHED):
        return 1
    return _divisor(b, max(1, b // _BLOCK))


def _depthwise_kernel(x: jax.Array, gradient: jax.Array, kernel: _Pair, strides: _Pair, pads: Pads) -> jax.Array:
    """The gradient of a depthwise kernel [kh, kw, 1, c], by one batched matmul for each of its rows.

    The matmul is over images and rows: for each channel, every column of x times every column of the gradient. Tap j of
    the row is the sum over the pairs of columns that it connects. All other pairs are computed in vain, still in a
    fraction of the time of the sums alone.
    """
    (kh, kw), (sh, sw), (ho, wo) = kernel, strides, gradient.shape[1:3]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)))
    x, gradient = (lax.optimization_barrier(y.transpose(3, 1, 0, 2)) for y in (x, gradient))  # [c, h, b, w]
    seen = x.shape[3]
    column, tap, output = (np.arange(n) for n in (seen, kw, wo))
    connected = column[:, None, None] == sw * output[:, None] + tap  # [columns of x, of the gradient, kw]
    rows = []
    for i in range(kh):
        part = lax.optimization_barrier(x[:, i : i + (ho - 1) * sh + 1 : sh])
        pairs = lax.dot_general(part, gradient, (((1, 2), (1, 2)), ((0,), (0,))))  # [c, columns, columns]
        taps = connected.reshape(-1, kw).astype(x.dtype)
        rows.append(
            lax.dot_general(lax.optimization_barrier(pairs).reshape(len(x), -1), taps, (((1,), (0,)), ((), ())))
        )
    return jnp.stack(rows).transpose(0, 2, 1)[:, :, None]  # [kh, c, kw] → [kh, kw, 1, c]


def bind_matmul(equation: JaxprEqn, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Binds a `dot_general`, or convolves by a 1×1 kernel if it is a wide dense layer of many rows.

    Without AVX-512 oneDNN's convolution is faster than its matmul there: 6,272 rows of 384 → 1,536 take 0.88 of the
    time, 1,536 → 384 take 0.74. Narrow layers gain nothing, and with over 2,048 inputs the convolution can be slow.
    """
    x, kernel = operands
    ((contracted, (inputs, *_)), batch), shape = equation.params["dimension_numbers"], x.shape
    dense = x.ndim > 2 and kernel.ndim == 2 and contracted == (x.ndim - 1,) and not any(batch)
    one_dtype = x.dtype == kernel.dtype == aval_of(equation.outvars[0]).dtype
    if not dense or not one_dtype or x.dtype not in (jnp.float32, jnp.bfloat16):
        return bind(equation, operands)
    k, n, rows = shape[-1], kernel.shape[1 - inputs], math.prod(shape[:-1])
    if not (384 <= k <= 2048 and n >= 192 and max(k, n) >= 768 and rows >= 784):
        return bind(equation, operands)
    x = x.reshape(shape[0], shape[1], -1, k)  # [b, h, w, k] or [b, n, 1, k]
    dimensions = "NHWC", "HWOI" if inputs else "HWIO", "NHWC"
    kernel = lax.optimization_barrier(kernel)[None, None]
    y = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dimensions)
    return [y.reshape(*shape[:-1], n)]


_conv_product = multilinear("onednn_conv", _conv, _conv_images, _conv_kernel)


def conv(x: jax.Array, kernel: jax.Array, strides: _Pair, pads: Pads, dtype: DTypeLike) -> jax.Array:
    """Convolution, [b, h, w, c] and [kh, kw, c, f] → [b, ho, wo, f] in `dtype`; depthwise with [kh, kw, 1, c].

    `pads` are ((top, bottom), (left, right)); negative padding crops.
    """
    return _conv_product(x, kernel, strides=strides, pads=pads, dtype=jnp.dtype(dtype))

"""Layers on images that lie mirrored, [c, h, w, b], as matrix products: what is fast on CPU.

There XLA's convolution and its gradients are slow, and a matrix product is near the machine's peak only where rows are
long, contiguous, and in the order that its library wants: the left side [m, k], the right side [k, n], neither
transposed. With the batch innermost, the patches of a convolution are copies of whole rows, in the order that the
forward product and the kernel's gradient want; element-wise operations run over contiguous vectors. For the gradients
the outputs' gradient is turned once, [f, ho, wo, b] → [ho, wo, b, f], after which both products have their order too.

Products have operands in `dtype`, float32 or bfloat16 (or float64), and sums in float32 (float64 for float64).
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

# The dimension numbers of [m, k] and [k, …] → [m, …], and of [ho, wo, b, k] and [k, n] → [ho, wo, b, n].
_FIRST, _LAST = (((1,), (0,)), ((), ())), (((3,), (0,)), ((), ()))

_FEW_CHANNELS = 32  # in and out: up to so many, a patch is for several outputs

Pads = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)


def wants_rows(dtype: Any) -> bool:
    """Whether the gradients' products are faster on `rows` by more than it costs to turn them: in bfloat16."""
    return dtype == jnp.bfloat16


def accumulator(dtype: Any) -> Any:
    """What products of operands in `dtype` are summed in."""
    return jnp.dtype(dtype if dtype == jnp.float64 else jnp.float32)


def _product(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """[m, k] times [k, …] → [m, …] in `dtype`."""
    return lax.dot_general(a, b, _FIRST, preferred_element_type=dtype)


def in_order(x: jax.Array) -> jax.Array:
    """x itself, computed here and laid out in memory as its shape says.

    Without it XLA leaves a transposed x where it lies and reads it across its rows, or computes x anew, as often as
    needed, inside of what reads it. Outside of `jit` it has no say.
    """
    if not isinstance(x, jax.core.Tracer):
        return x
    return lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))


def rows(x: jax.Array, dtype: Any) -> jax.Array:
    """[f, ho, wo, b] → [ho, wo, b, f] in `dtype`: turned in memory where products want it, else in name only."""
    x = x.astype(dtype).transpose(1, 2, 3, 0)
    return in_order(x) if wants_rows(dtype) else x


def patches(x: jax.Array, kernel: tuple[int, int], strides: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """[c, h, w, b] → [kh * kw * c, ho, wo, b]: under each output position, the inputs that its kernel sees."""
    (kh, kw), (sh, sw), (ho, wo) = kernel, strides, size
    c, b = x.shape[0], x.shape[3]
    if (kh, kw) == (1, 1):
        return x[:, : (ho - 1) * sh + 1 : sh, : (wo - 1) * sw + 1 : sw]
    corners = jnp.asarray([(i, j) for i in range(kh) for j in range(kw)])  # [kh * kw, 2]
    x = in_order(x)

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
    gradient: jax.Array, weights: jax.Array, x: jax.Array, extent: tuple[int, int], strides: tuple[int, int], dtype: Any
) -> jax.Array:
    """Of x [c, h, w, b], from that of the outputs, `rows`, and weights [kh * kw * c, f] for patches of x."""
    if wants_rows(dtype):
        d_patches = lax.dot_general(gradient, in_order(weights.T), _LAST, preferred_element_type=dtype)
    else:
        d_patches = jnp.moveaxis(_product(weights, jnp.moveaxis(gradient, 3, 0), dtype), 0, 3)
    d_patches = d_patches.reshape(*gradient.shape[:3], *extent, x.shape[0])
    d_x = _sum_patches(d_patches, (x.shape[1], x.shape[2]), strides, accumulator(dtype)).astype(x.dtype)
    if wants_rows(dtype):
        d_x = in_order(d_x)
    return in_order(d_x.transpose(3, 0, 1, 2))


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, dtype: Any) -> jax.Array:
    """The convolution [c, h, w, b] and [kh, kw, c, f] → [f, ho, wo, b] in float32 (float64 for float64).

    `pads` are the zeros before and behind, down and across; a negative number cuts off.
    """
    return _conv_forward(x, kernel, strides, pads, dtype)[0]


def _conv_forward(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, dtype: Any
) -> tuple[jax.Array, Any]:
    padded, block = pad(x, pads, dtype), _block(kernel, strides)
    return outputs(padded, kernel.astype(dtype), strides, block), (x, kernel)


def outputs(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], block: tuple[int, int]) -> jax.Array:
    """The convolution of x [c, h, w, b], padded, both in the products' dtype → [f, ho, wo, b]."""
    (th, tw), (ho, wo), f, b = block, _output_size(x, kernel, strides), kernel.shape[3], x.shape[3]
    patches = _block_patches(x, kernel, strides, block)
    # Transposed outside of the product: XLA 0.12 cannot run a bfloat16 product whose left side it must transpose.
    weights = in_order(_block_kernel(kernel, block).reshape(-1, th * tw * f).T)
    y = _product(weights, patches, accumulator(x.dtype))
    if block == (1, 1):
        return y
    y = lax.optimization_barrier(y).reshape(th, tw, f, *patches.shape[1:3], b)
    y = y.transpose(2, 3, 0, 4, 1, 5).reshape(f, th * y.shape[3], tw * y.shape[4], b)
    return in_order(y[:, :ho, :wo])  # or all that reads it puts the blocks in their places anew


def conv_gradients(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, dtype: Any, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Those of x and kernel, from that of the outputs, `rows`."""
    kh, kw, c, f = kernel.shape
    padded = pad(x, pads, dtype)
    patches = _block_patches(padded, kernel, strides, (1, 1))  # the forward pass's, computed once
    d_kernel = kernel_gradient(patches, gradient, dtype).reshape(kernel.shape).astype(kernel.dtype)
    weights = kernel.astype(dtype).reshape(kh * kw * c, f)
    d_x = input_gradient(gradient, weights, padded, (kh, kw), strides, dtype)
    (top, bottom), (left, right) = pads
    return pad(d_x, ((-top, -bottom), (-left, -right)), x.dtype), d_kernel


def _conv_backward(
    strides: tuple[int, int], pads: Pads, dtype: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    (kh, kw, _, _), block = kernel.shape, _block(kernel, strides)
    if block == (1, 1):
        return conv_gradients(x, kernel, strides, pads, dtype, rows(gradient, dtype))
    gradient = gradient.astype(dtype)
    d_kernel = _block_kernel_gradient(pad(x, pads, dtype), kernel, block, gradient).astype(kernel.dtype)
    # Of x, the convolution of the outputs' gradient with the flipped kernel: no patches' gradients to compute and sum.
    top, left = kh - 1 - pads[0][0], kw - 1 - pads[1][0]
    bottom, right = (x.shape[i] - gradient.shape[i] + kernel.shape[i - 1] - 1 for i in (1, 2))
    around = pad(gradient, ((top, bottom - top), (left, right - left)), dtype)
    flipped = kernel[::-1, ::-1].swapaxes(2, 3).astype(dtype)
    return outputs(around, flipped, (1, 1), block).astype(x.dtype), d_kernel


def _block_kernel_gradient(x: jax.Array, kernel: jax.Array, block: tuple[int, int], gradient: jax.Array) -> jax.Array:
    """[kh, kw, c, f] from x [c, h, w, b], padded, and [f, ho, wo, b], both in the products' dtype; of stride 1."""
    (kh, kw, c, f), (th, tw), dtype = kernel.shape, block, x.dtype
    patches = _block_patches(x, kernel, (1, 1), block)  # the forward pass's, computed once
    _, rows, columns, b = patches.shape
    missing = ((0, rows * th - gradient.shape[1]), (0, columns * tw - gradient.shape[2]))
    blocks = pad(gradient, missing, dtype).reshape(f, rows, th, columns, tw, b)
    turned = blocks.transpose(1, 3, 5, 2, 4, 0).reshape(rows, columns, b, th * tw * f)
    sums = kernel_gradient(patches, in_order(turned) if wants_rows(dtype) else turned, dtype)
    sums = sums.reshape(kh + th - 1, kw + tw - 1, c, th, tw, f)
    places = itertools.product(range(th), range(tw))
    return functools.reduce(jnp.add, [sums[i : i + kh, j : j + kw, :, i, j] for i, j in places])


conv.defvjp(_conv_forward, _conv_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """The flattened image times the kernel, [c, h, w, b] and [h * w * c, d] → [d, b], in float32 (or float64)."""
    return _dense_forward(x, kernel, dtype)[0]


def _dense_forward(x: jax.Array, kernel: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    c, h, w, b = x.shape
    weights = kernel.astype(dtype).reshape(h, w, c, -1).transpose(3, 2, 0, 1).reshape(-1, c * h * w)
    y = _product(in_order(weights), x.astype(dtype).reshape(-1, b), accumulator(dtype))
    return lax.optimization_barrier(y), (x, kernel)


def _dense_backward(dtype: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    c, h, w, b = x.shape
    turned = in_order(gradient.astype(dtype).T)  # [b, d]
    d_kernel = _product(x.astype(dtype).reshape(-1, b), turned, accumulator(dtype))
    d_kernel = d_kernel.reshape(c, h, w, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)
    d_x = _product(turned, in_order(kernel.astype(dtype).T), dtype).reshape(b, h, w, c)
    return jnp.swapaxes(d_x, 0, 3).astype(x.dtype), d_kernel.astype(kernel.dtype)


dense.defvjp(_dense_forward, _dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense_first(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """A dense layer on features that come first: [d, …] and [d, f] → [f, …], in float32 (float64 for float64)."""
    return _dense_first_forward(x, kernel, dtype)[0]


def _dense_first_forward(x: jax.Array, kernel: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    y = _product(in_order(kernel.astype(dtype).T), x.astype(dtype).reshape(x.shape[0], -1), accumulator(dtype))
    return y.reshape(-1, *x.shape[1:]), (x, kernel)


def _dense_first_backward(
    dtype: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    gradient = gradient.astype(dtype).reshape(gradient.shape[0], -1)
    d_x = _product(kernel.astype(dtype), gradient, x.dtype).reshape(x.shape)
    turned = in_order(gradient.T) if wants_rows(dtype) else gradient.T
    d_kernel = _product(x.astype(dtype).reshape(x.shape[0], -1), turned, accumulator(dtype))
    return d_x, lax.optimization_barrier(d_kernel).astype(kernel.dtype)


dense_first.defvjp(_dense_first_forward, _dense_first_backward)


def _each(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """The product of each two matrices, [b, h, m, k] times [b, h, k, n] → [b, h, m, n] in `dtype`."""
    return lax.dot_general(a, b, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=dtype)


def _turned(x: jax.Array) -> jax.Array:
    return in_order(x.swapaxes(2, 3))


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention of each head, of q, k and v [h, d, b, n] of one dtype → ([h, d, b, n] in that dtype, its maps).

    The maps are f32[b, h, n, n] (float64 for float64), keys by queries, and not differentiated.
    """
    return _attention_forward(q, k, v)[0]


def _attention_forward(
    q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    dtype, wide = q.dtype, accumulator(q.dtype)
    q, k, v = (in_order(x.transpose(2, 0, 1, 3)) for x in (q, k, v))  # [b, h, d, n]
    scores = _each(_turned(k), q, wide) * jnp.asarray(q.shape[2] ** -0.5, wide)
    maps = jax.nn.softmax(scores, 2)  # over the keys, so that its sums run along vectors
    low = maps.astype(dtype)
    return (_each(v, low, dtype).transpose(1, 2, 0, 3), maps), (q, k, v, low)


def _attention_backward(
    saved: tuple[jax.Array, ...], gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, maps = saved
    dtype, wide = q.dtype, accumulator(q.dtype)
    gradient = in_order(gradients[0].transpose(2, 0, 1, 3))  # [b, h, d, queries]
    d_v = _each(gradient, _turned(maps), dtype)
    d_maps = _each(_turned(v), gradient, wide)  # [b, h, keys, queries]
    weighted = maps.astype(wide) * d_maps
    d_scores = weighted - maps.astype(wide) * jnp.sum(weighted, 2, keepdims=True)
    d_scores = (d_scores * jnp.asarray(q.shape[2] ** -0.5, wide)).astype(dtype)
    d_q, d_k = _each(k, d_scores, dtype), _each(q, _turned(d_scores), dtype)
    d_q, d_k, d_v = (x.transpose(1, 2, 0, 3) for x in (d_q, d_k, d_v))
    return d_q, d_k, d_v


attention.defvjp(_attention_forward, _attention_backward)

"""JPEG compression and decompression on the device, bit-identical to Pillow.

Follows baseline JPEG (ITU-T T.81, tables K.1 and K.2) and JFIF as libjpeg implements them: integer conversion to YCbCr
and back, 4:2:0 chroma subsampling by the mean of 2 x 2 pixels, the accurate ("slow") integer DCT of 8 x 8 blocks,
quantization, and chroma upsampling with a triangle filter. All arithmetic is in integers, with libjpeg's rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np

_LUMA = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
           18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_CHROMA = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
             99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""
_BITS = 13  # fractional bits of the DCT's constants
_HALF = 1 << 15  # one half in the 16.16 fixed point of the color conversions


def quantization_tables(quality: int) -> np.ndarray:
    """Returns the luma and chroma quantization tables i32[2, 8, 8] for a quality of 1 to 100."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = np.array([_LUMA.split(), _CHROMA.split()], np.int64).reshape(2, 8, 8)
    return np.clip((base * scale + 50) // 100, 1, 255).astype(np.int32)


def _dct() -> np.ndarray:
    """Returns the DCT of eight values as integers i32[8, 8]: sqrt(8) * 2**13 times the orthonormal DCT.

    It is the product of the steps of Loeffler, Ligtenberg and Moschytz (1989), which round their constants separately,
    so some entries are not the rounded cosines.
    """
    x = np.eye(8, dtype=np.int64)
    even, odd = x[:4] + x[:3:-1], x[:4] - x[:3:-1]
    out = np.empty((8, 8), np.int64)
    out[0] = (even.sum(0)) << _BITS
    out[4] = (even[0] - even[1] - even[2] + even[3]) << _BITS
    outer, inner = even[0] - even[3], even[1] - even[2]
    both = _rounded(0.541196100) * (outer + inner)
    out[2], out[6] = both + _rounded(0.765366865) * outer, both - _rounded(1.847759065) * inner
    a, b, c, d = odd[::-1]
    both = _rounded(1.175875602) * (a + b + c + d)
    ad, bc = -_rounded(0.899976223) * (a + d), -_rounded(2.562915447) * (b + c)
    ac, bd = both - _rounded(1.961570560) * (a + c), both - _rounded(0.390180644) * (b + d)
    out[7], out[5] = _rounded(0.298631336) * a + ad + ac, _rounded(2.053119869) * b + bc + bd
    out[3], out[1] = _rounded(3.072711026) * c + bc + ac, _rounded(1.501321110) * d + ad + bd
    return out.astype(np.int32)


def _rounded(value: float) -> int:
    return int(value * (1 << _BITS) + 0.5)


def jpeg(images: jax.Array, quantization: jax.Array) -> jax.Array:
    """Compresses and decompresses images uint8[b, h, w, c], c 1 or 3, with `quantization_tables`."""
    h, w, c = images.shape[1:]
    if c == 1:
        plane = _code_blocks(_pad_to_multiples(images[..., 0].astype(jnp.int32), 8, 8), quantization[0])
        return plane[:, :h, :w, None].astype(jnp.uint8)
    y, cb, cr = _to_ycc(images)  # i32[b, h, w] each
    y = _code_blocks(_pad_to_multiples(y, 8, 8), quantization[0])[:, :h, :w]
    cb, cr = (_upsample(_code_chroma(plane, quantization[1]), h, w) for plane in (cb, cr))
    return _to_rgb(y, cb, cr)


def _fixed(value: float) -> int:
    return int(value * 65536 + 0.5)


def _to_ycc(images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    r, g, b = (images[..., i].astype(jnp.int32) for i in range(3))
    middle = (128 << 16) + _HALF - 1
    y = (_fixed(0.299) * r + _fixed(0.587) * g + _fixed(0.114) * b + _HALF) >> 16
    cb = (-_fixed(0.168735892) * r - _fixed(0.331264108) * g + _fixed(0.5) * b + middle) >> 16
    cr = (_fixed(0.5) * r - _fixed(0.418687589) * g - _fixed(0.081312411) * b + middle) >> 16
    return y, cb, cr


def _to_rgb(y: jax.Array, cb: jax.Array, cr: jax.Array) -> jax.Array:
    cb, cr = cb - 128, cr - 128
    r = y + ((_fixed(1.402) * cr + _HALF) >> 16)
    g = y + ((-_fixed(0.34414) * cb - _fixed(0.71414) * cr + _HALF) >> 16)
    b = y + ((_fixed(1.772) * cb + _HALF) >> 16)
    return jnp.clip(jnp.stack([r, g, b], -1), 0, 255).astype(jnp.uint8)


def _pad_to_multiples(planes: jax.Array, rows: int, columns: int) -> jax.Array:
    """Pads [b, h, w] to multiples by repeating the last row and column."""
    h, w = planes.shape[1:]
    return jnp.pad(planes, ((0, 0), (0, -h % rows), (0, -w % columns)), "edge")


def _code_blocks(planes: jax.Array, table: jax.Array) -> jax.Array:
    """Quantizes i32[b, h, w], h and w multiples of 8: the DCT of each block, quantization, and the inverse DCT."""
    b, h, w = planes.shape
    blocks = (planes - 128).reshape(b, h // 8, 8, w // 8, 8).transpose(0, 1, 3, 2, 4)  # [b, m, n, 8, 8]
    dct = _dct()
    scaled = _transform(_transform(blocks, dct, -1, _BITS - 2), dct, -2, _BITS + 2)  # 8 times the coefficients
    steps = (jnp.abs(scaled) + 4 * table) // (8 * table)
    blocks = jnp.sign(scaled) * steps * table
    blocks = _transform(_transform(blocks, dct.T, -2, _BITS - 2), dct.T, -1, _BITS + 5)
    return jnp.clip(blocks + 128, 0, 255).transpose(0, 1, 3, 2, 4).reshape(b, h, w)


def _transform(blocks: jax.Array, matrix: np.ndarray, axis: int, shift: int) -> jax.Array:
    """Multiplies the blocks by a matrix along one axis, divides by 2**shift and rounds."""
    # An explicit sum, because some chips lack int32 matmuls.
    terms = jnp.expand_dims(blocks, axis - 1) * (matrix if axis == -1 else matrix[..., None])
    return (terms.sum(axis, dtype=jnp.int32) + (1 << (shift - 1))) >> shift


def _code_chroma(planes: jax.Array, table: jax.Array) -> jax.Array:
    """Subsamples and quantizes i32[b, h, w] to i32[b, ceil(h / 2), ceil(w / 2)]."""
    h, w = planes.shape[1:]
    planes = _pad_to_multiples(planes, 2, 16)
    total = planes[:, ::2] + planes[:, 1::2]
    total = total[..., ::2] + total[..., 1::2]
    bias = 1 + jnp.arange(total.shape[-1], dtype=jnp.int32) % 2  # libjpeg rounds halves down and up alternately
    return _code_blocks(_pad_to_multiples((total + bias) >> 2, 8, 8), table)[:, : -(-h // 2), : -(-w // 2)]


def _upsample(planes: jax.Array, h: int, w: int) -> jax.Array:
    """Doubles i32[b, m, n] in both directions with a triangle filter: weights 3/4 (nearest) and 1/4 (next)."""
    if planes.shape[-1] <= 2:  # libjpeg repeats the values of such a narrow plane
        return jnp.repeat(jnp.repeat(planes, 2, 1), 2, 2)[:, :h, :w]
    near = 3 * planes
    padded = jnp.pad(planes, ((0, 0), (1, 1), (0, 0)), "edge")
    rows = jnp.stack([near + padded[:, :-2], near + padded[:, 2:]], 2).reshape(planes.shape[0], -1, planes.shape[2])
    padded = jnp.pad(rows, ((0, 0), (0, 0), (1, 1)), "edge")
    left = (3 * rows + padded[..., :-2] + 8) >> 4
    right = (3 * rows + padded[..., 2:] + 7) >> 4
    return jnp.stack([left, right], -1).reshape(*rows.shape[:2], -1)[:, :h, :w]

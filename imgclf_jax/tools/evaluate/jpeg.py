"""What JPEG does to images, on the device: written at a quality and read again.

The steps are those of the baseline standard (ITU-T T.81 with its tables K.1 and K.2) and of JFIF, as the library
libjpeg, and so Pillow, takes them: the integer conversion to YCbCr and back, chroma halved in both directions (4:2:0)
by the mean of 2 x 2 pixels, the slow and exact DCT of blocks of 8 x 8, quantization, and chroma enlarged by a triangle
filter. All is computed in integers, with the library's roundings, so that results are Pillow's bit for bit.
"""

import jax
import jax.numpy as jnp
import numpy as np

_LUMA = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
           18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_CHROMA = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
             99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""
_BITS = 13  # of the fractions of the DCT's constants
_HALF = 1 << 15  # one half in the 16.16 fixed point of the conversions


def tables(quality: int) -> np.ndarray:
    """The quantization tables i32[2, 8, 8], of luma and of chroma, at a quality of 1 to 100."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = np.array([_LUMA.split(), _CHROMA.split()], np.int64).reshape(2, 8, 8)
    return np.clip((base * scale + 50) // 100, 1, 255).astype(np.int32)


def _dct() -> np.ndarray:
    """The DCT of eight values as whole numbers, i32[8, 8]: sqrt(8) times the orthonormal one, times 2**13.

    It is the product of the steps of Loeffler, Ligtenberg and Moschytz (1989), whose constants are rounded one by one.
    So some entries are not the nearest ones to the cosines.
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
    """Images uint8[b, h, w, c], c being 1 or 3, after JPEG with these `tables`."""
    h, w, c = images.shape[1:]
    if c == 1:
        plane = _coded(_grown(images[..., 0].astype(jnp.int32), 8, 8), quantization[0])
        return plane[:, :h, :w, None].astype(jnp.uint8)
    y, cb, cr = _to_ycc(images)  # i32[b, h, w] each
    y = _coded(_grown(y, 8, 8), quantization[0])[:, :h, :w]
    cb, cr = (_enlarged(_coded_chroma(plane, quantization[1]), h, w) for plane in (cb, cr))
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


def _grown(planes: jax.Array, rows: int, columns: int) -> jax.Array:
    """[b, h, w] with the last row and column repeated up to multiples."""
    h, w = planes.shape[1:]
    return jnp.pad(planes, ((0, 0), (0, -h % rows), (0, -w % columns)), "edge")


def _coded(planes: jax.Array, table: jax.Array) -> jax.Array:
    """i32[b, h, w], multiples of 8, after the DCT of each block, the rounding of its coefficients, and back."""
    b, h, w = planes.shape
    blocks = (planes - 128).reshape(b, h // 8, 8, w // 8, 8).transpose(0, 1, 3, 2, 4)  # [b, m, n, 8, 8]
    dct = _dct()
    found = _transformed(_transformed(blocks, dct, -1, _BITS - 2), dct, -2, _BITS + 2)  # 8 times the coefficients
    steps = (jnp.abs(found) + 4 * table) // (8 * table)
    blocks = jnp.sign(found) * steps * table
    blocks = _transformed(_transformed(blocks, dct.T, -2, _BITS - 2), dct.T, -1, _BITS + 5)
    return jnp.clip(blocks + 128, 0, 255).transpose(0, 1, 3, 2, 4).reshape(b, h, w)


def _transformed(blocks: jax.Array, matrix: np.ndarray, axis: int, shift: int) -> jax.Array:
    """A matrix along one axis of the blocks, divided by 2**shift and rounded. Sums, since not all chips have products
    of matrices of i32."""
    terms = jnp.expand_dims(blocks, axis - 1) * (matrix if axis == -1 else matrix[..., None])
    return (terms.sum(axis, dtype=jnp.int32) + (1 << (shift - 1))) >> shift


def _coded_chroma(planes: jax.Array, table: jax.Array) -> jax.Array:
    """i32[b, h, w] to the halved and coded plane, i32[b, ceil(h / 2), ceil(w / 2)]."""
    h, w = planes.shape[1:]
    planes = _grown(planes, 2, 16)
    total = planes[:, ::2] + planes[:, 1::2]
    total = total[..., ::2] + total[..., 1::2]
    bias = 1 + jnp.arange(total.shape[-1], dtype=jnp.int32) % 2  # halves are rounded down and up in turn
    return _coded(_grown((total + bias) >> 2, 8, 8), table)[:, : -(-h // 2), : -(-w // 2)]


def _enlarged(planes: jax.Array, h: int, w: int) -> jax.Array:
    """Each value of i32[b, m, n] to 2 x 2, from the nearest with the weight 3/4 and the next one with 1/4, each way."""
    if planes.shape[-1] <= 2:  # the library repeats the values of so narrow a plane
        return jnp.repeat(jnp.repeat(planes, 2, 1), 2, 2)[:, :h, :w]
    near = 3 * planes
    padded = jnp.pad(planes, ((0, 0), (1, 1), (0, 0)), "edge")
    rows = jnp.stack([near + padded[:, :-2], near + padded[:, 2:]], 2).reshape(planes.shape[0], -1, planes.shape[2])
    padded = jnp.pad(rows, ((0, 0), (0, 0), (1, 1)), "edge")
    left = (3 * rows + padded[..., :-2] + 8) >> 4
    right = (3 * rows + padded[..., 2:] + 7) >> 4
    return jnp.stack([left, right], -1).reshape(*rows.shape[:2], -1)[:, :h, :w]

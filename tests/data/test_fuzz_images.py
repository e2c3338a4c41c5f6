"""Fuzzed images: each is decoded or refused in one sentence, and never takes a gigabyte."""

import struct
import zlib

import numpy as np
import pytest
from fuzzing import BYTES, SIZES, answered, with_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from test_decode import encode, noise, png_of

from imgclf_jax.data.decode import decode

# Pillow's warnings must not be errors here: what comes after them is of interest too.
pytestmark = [pytest.mark.usefixtures("a_gigabyte"), pytest.mark.filterwarnings("ignore::UserWarning:PIL")]

PIXELS = Image.fromarray(noise(9, 12, 3))
FORMS = [("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "I;16", {}), ("JPEG", "RGB", {}),
         ("JPEG", "RGB", {"progressive": True}), ("GIF", "P", {}), ("BMP", "RGB", {}), ("BMP", "P", {}),
         ("WEBP", "RGB", {}), ("PPM", "RGB", {}), ("PPM", "L", {}),
         ("TIFF", "RGB", {}), ("TIFF", "L", {"compression": "tiff_lzw"}), ("TIFF", "RGB", {"compression": "jpeg"}),
         ("TIFF", "1", {"compression": "group4"}), ("MPO", "RGB", {})]  # fmt: skip
FORMS += [("AVIF", "RGB", {})] if features.check("avif") else []
IMAGES = [encode(PIXELS.convert(mode), form, **options) for form, mode, options in FORMS]
CHANNELS = st.sampled_from([1, 3, 4])


def check_image(content, channels):
    out = answered(decode, content, channels)
    assert out is None or (out.dtype, out.ndim, out.shape[2]) == (np.uint8, 3, channels)


@settings(max_examples=400)
@given(st.sampled_from(IMAGES), BYTES, st.integers(0, 40), CHANNELS)
def test_images_with_changed_bytes(whole, changes, cut, channels):
    check_image(with_bytes(whole, [(place % 600, value) for place, value in changes], cut), channels)


@settings(max_examples=150)
@given(
    st.integers(0, 2**32 - 1) | SIZES,
    SIZES,
    st.sampled_from([1, 2, 4, 8, 16, 3]),
    st.integers(0, 7),
    st.integers(0, 2),
    st.sampled_from([b"eXIf", b"zTXt", b"iCCP", b"PLTE", b"tRNS", b"acTL", b"fdAT"]),
    st.binary(max_size=20),
    CHANNELS,
)
def test_png_by_its_parts(width, height, depth, colour, interlaced, name, body, channels):
    header = struct.pack(">IIBBBBB", width % 2**32, height % 2**32, depth, colour, 0, 0, interlaced)
    bomb = zlib.compress(bytes(100_000))
    chunks = [(b"IHDR", header), (name, body), (name, b"x\0\0" + bomb), (b"IDAT", bomb), (b"IEND", b"")]
    check_image(png_of(chunks), channels)


TAGS = st.sampled_from(
    [256, 257, 258, 259, 262, 266, 270, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339]
)


@settings(max_examples=200)
@given(st.lists(st.tuples(TAGS, st.integers(0, 13), SIZES, SIZES | st.integers(0, 65535)), max_size=4), CHANNELS)
def test_tiff_by_its_tags(entries, channels):
    """The tags of a valid file, some replaced or added, of any kind, number and value."""
    tags = {256: (3, 1, 4), 257: (3, 1, 4), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 200),
            277: (3, 1, 1), 278: (3, 1, 4), 279: (4, 1, 16)}  # fmt: skip
    tags |= {tag: (kind, count % 2**32, value % 2**32) for tag, kind, count, value in entries}
    body = b"".join(struct.pack("<HHII", tag, *tags[tag]) for tag in sorted(tags))
    check_image((b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + body).ljust(200, b"\0") + bytes(400), channels)

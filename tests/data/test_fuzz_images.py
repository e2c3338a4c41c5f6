"""Any image, fuzzed or of the largest size, is decoded or refused in one sentence; no other program is run."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from fuzzing import BYTES, SIZES, answered, with_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from test_decode import encode, noise, png_of

from imgclf_jax.core.errors import UserError
from imgclf_jax.data.decode import build, decode, read_file

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


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"


def test_no_other_program_is_run():
    """Pillow would pass an EPS file, whatever its name, to Ghostscript."""
    assert Image.open(io.BytesIO(EPS)).format == "EPS"
    with pytest.raises(UserError, match=r"in none of the formats JPEG, "):
        decode(EPS)


def bomb(h, w):
    """A PNG of zeros that claims h by w pixels of 1 bit."""
    header = struct.pack(">IIBBBBB", w, h, 1, 0, 0, 0, 0)
    return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")])


@pytest.mark.parametrize("filters", ["error", "ignore", "default"])
@pytest.mark.parametrize("size", [(8193, 8192), (1, 2**26 + 1), (9500, 9500), (2**14, 2**14), (2**31 - 1, 2**31 - 1)])
def test_an_image_of_too_many_pixels(size, filters):
    """Below, between and above Pillow's own limits, however its warnings are filtered: one sentence."""
    with warnings.catch_warnings(record=True):
        warnings.simplefilter(filters)
        with pytest.raises(UserError, match=r"^the image has more than 67,108,864 pixels; make it smaller$"):
            decode(bomb(*size))
    with pytest.raises(UserError, match=r"^the image has 1 by 60,000,000 pixels, but a side may have 1,048,576; crop"):
        decode(bomb(1, 60_000_000))  # Pillow would allocate weights for each pixel of a side


def test_a_tiff_image_whose_tiles_fill_the_memory():
    """libtiff would allocate 2 GB for a tile of 65,536 by 30,000 pixels of a 16 by 16 image."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 284: 1, 322: 65_536, 323: 30_000, 324: 100, 325: 50}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(400)
    with pytest.raises(UserError, match=r"^the image has tiles of 65,536 by 30,000 pixels; save it again without"):
        decode(content)


@pytest.mark.parametrize(("size", "ops", "words"), [
    ((1, 1_000_000), "resize_small(72)", "1 by 1,000,000 pixels, on its way to 72 by 72,000,000,"),
    ((1_000_000, 1), "resize_small(72, like='torchvision')", "to 72,000,000 by 72,"),
    ((1, 1_000_000), "resize(256, method='area')", "to 256 by 256,"),
    ((8, 8), "inception_crop(100_000)", "to 100,000 by 100,000"),
    ((8, 8), "random_resized_crop(100_000)", "to 100,000 by 100,000,"),
    ((8, 8), f"{__name__}:tall", f"the image after {__name__}:tall"),
])  # fmt: skip
def test_an_image_that_an_op_makes_too_large(size, ops, words):
    """A file of 2 kB could fill any machine, so it is refused before memory is allocated."""
    apply, _ = build(f"decode(1)|{ops}")
    with pytest.raises(UserError, match=rf"{words} has more than 67,108,864 pixels; make it smaller$"):
        apply(encode(np.zeros((*size, 1), np.uint8), "PNG"), 0, 0)


def tall(image):
    """A user's own op, with a view that takes no memory."""
    return np.broadcast_to(image[:1], (2**26, *image.shape[1:]))


def test_a_file_longer_than_any_image(tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UserError, match="the file has 1,073,741,824 bytes, but an image may have 536,870,912"):
        read_file(tmp_path / "x.png")

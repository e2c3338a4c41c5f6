"""The formats that are decoded and the largest sizes: no other program runs, and memory is bounded."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from test_decode import encode, png_of

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode

pytestmark = pytest.mark.usefixtures("a_gigabyte")

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"


def test_no_other_program_is_run():
    """Pillow would pass an EPS file, whatever its name, to Ghostscript."""
    assert Image.open(io.BytesIO(EPS)).format == "EPS"
    with pytest.raises(UserError, match=r"in none of the formats JPEG, "):
        decode.decode(EPS)


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
            decode.decode(bomb(*size))
    with pytest.raises(UserError, match=r"^the image has 1 by 60,000,000 pixels, but a side may have 1,048,576; crop"):
        decode.decode(bomb(1, 60_000_000))  # Pillow would allocate weights for each pixel of a side


def test_a_tiff_image_whose_tiles_fill_the_memory():
    """libtiff would allocate 2 GB for a tile of 65,536 by 30,000 pixels of a 16 by 16 image."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 284: 1, 322: 65_536, 323: 30_000, 324: 100, 325: 50}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(400)
    with pytest.raises(UserError, match=r"^the image has tiles of 65,536 by 30,000 pixels; save it again without"):
        decode.decode(content)


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
    apply, _ = decode.build(f"decode(1)|{ops}")
    with pytest.raises(UserError, match=rf"{words} has more than 67,108,864 pixels; make it smaller$"):
        apply(encode(np.zeros((*size, 1), np.uint8), "PNG"), 0, 0)


def tall(image):
    """A user's own op, with a view that takes no memory."""
    return np.broadcast_to(image[:1], (2**26, *image.shape[1:]))


def test_a_file_longer_than_any_image(tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UserError, match="the file has 1,073,741,824 bytes, but an image may have 536,870,912"):
        decode.read_file(tmp_path / "x.png")

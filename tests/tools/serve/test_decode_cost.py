"""Small files that would take minutes to decode are refused up front, and usual files are not."""

import io
import math
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.serve import decode_cost


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def encode(image, form, **options):
    content = io.BytesIO()
    Image.fromarray(image).save(content, form, **options)
    return content.getvalue()


def jpeg(scans, size):
    """A progressive JPEG with this many scans; the added ones are empty, but pass over all pixels."""
    content = io.BytesIO()
    Image.new("L", (size, size)).save(content, "JPEG", progressive=True)
    data = content.getvalue()
    own = data.count(b"\xff\xda")
    begin = data.rindex(b"\xff\xda")
    last = data[begin:-2]
    return data[:-2] + last * (scans - own) + data[-2:]


def with_segments(data, *segments):
    """The JPEG file with these (marker, content) pairs at its start."""
    added = [bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content for marker, content in segments]
    return data[:2] + b"".join(added) + data[2:]


def with_profiles(count, profile):
    content = b"iCCP" + b"a\0\0" + zlib.compress(profile, 9)
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    data = encode(noise(8, 8, 3), "PNG")
    return data[:33] + chunk * count + data[33:]  # after the header


@pytest.mark.parametrize(("data", "words"), [
    (jpeg(501, 8), "the JPEG image has 501 scans, but one of 64 pixels may have 500"),
    (jpeg(300, 2000), "has 300 scans, but one of 4,000,000 pixels may have 268"),
    (with_segments(jpeg(501, 8), (0xFE, b"\xff\xd9")), "has 501 scans"),  # a comment does not end the image
    (jpeg(20, 8)[:-2] + b"\xff\xfe\0\2" * 100_000 + b"\xff\xd9", "more than 65,536 segments"),
    (with_profiles(3000, bytes(1_000_000)), "more than 16 color profiles"),
    (b"P3\n8 8 255\n" + b"#\n" * 2_000_000 + b"1 " * 192, "more than 1,000 comments"),
    (b"P2\n5000 5000 255\n" + b"1 " * 25_000_000, "25,000,000 values in a form that is slow to read"),
    (b"P6\n3000 2000 100\n" + bytes(18_000_000), "18,000,000 values in a form that is slow to read"),
], ids=["scans", "large scans", "comment", "segments", "profiles", "comments", "plain", "other range"])  # fmt: skip
def test_a_file_that_takes_minutes(data, words):
    begun = time.process_time()
    with pytest.raises(UserError, match=words):
        decode_cost.check(data, math.inf, math.inf)
    assert time.process_time() - begun < 2


def test_usual_files_pass():
    """Random bytes may contain the marker of a scan; photographs have 10 scans, and PNG images a color profile."""
    image = noise(1000, 1000, 3)
    for data in (encode(image, "PNG", compress_level=1), encode(image, "BMP"), encode(image, "PPM")):
        assert data.count(b"\xff\xda") > 20
        assert decode_cost.work_of(data) == 10**6
    assert decode_cost.work_of(encode(image, "JPEG", progressive=True)) == 10**7
    assert decode_cost.work_of(encode(image, "JPEG", quality=95)) == 10**6
    photo, scans = encode(noise(8, 8, 3), "JPEG"), b"\xff\xda" * 501
    several = encode(noise(8, 8, 3), "MPO", save_all=True, append_images=[Image.new("L", (8, 8))])
    # A video after a phone's photograph, also if a fill byte stands before its end, thumbnails, other images of MPO.
    for data in (photo + scans, photo[:-2] + b"\xff" + photo[-2:] + scans, with_segments(photo, (0xE1, scans)),
                 several + scans):  # fmt: skip
        assert decode_cost.work_of(data) == 64
    assert decode_cost.work_of(jpeg(500, 8)) == 500 * 64
    assert decode_cost.work_of(with_profiles(1, b"profile")) == 64
    assert decode_cost.work_of(b"P2\n# one\n2 1 255\n1 2") == 2


def test_limits_of_a_caller():
    """By pixels times scans, by file size before anything is read, and for a thin image, which an op may enlarge."""
    sizes = (10, 10), (11, 11), (1, 90), (30, 30)
    small, large, thin, long = (encode(noise(*size, 3), "PNG") for size in sizes)
    decode_cost.check(small, 100, 2000)
    for data in (large, jpeg(20, 8), thin, long):
        with pytest.raises(decode_cost.Costly):
            decode_cost.check(data, 100, 2000)
    decode_cost.check(b"no image", 100, 2000)  # `decode` says so

"""Small files that would take minutes to decode are refused up front, and usual files are not."""

import concurrent.futures
import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from test_decode import encode, noise, png

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode, decode_cost, resizing


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
    return png(noise(8, 8, 3), 8, 2, [(b"iCCP", b"a\0\0" + zlib.compress(profile, 9))] * count)


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
        decode.decode(data)
    assert time.process_time() - begun < 2


def test_usual_files_are_decoded():
    """Random bytes may contain the marker of a scan; photographs have 10 scans, and PNG images a color profile."""
    image = noise(1000, 1000, 3)
    for data in (encode(image, "PNG", compress_level=1), encode(image, "BMP"), encode(image, "PPM")):
        assert data.count(b"\xff\xda") > 20
        np.testing.assert_array_equal(decode.decode(data), image)
    for kind in ({"progressive": True}, {"quality": 95}):
        assert decode.decode(encode(image, "JPEG", **kind)).shape == image.shape
    photo, scans = encode(noise(8, 8, 3), "JPEG"), b"\xff\xda" * 501
    several = encode(noise(8, 8, 3), "MPO", save_all=True, append_images=[Image.new("L", (8, 8))])
    # A video after a phone's photograph, also if a fill byte stands before its end, thumbnails, other images of MPO.
    for data, same in ((photo + scans, photo), (photo[:-2] + b"\xff" + photo[-2:] + scans, photo),
                       (with_segments(photo, (0xE1, scans)), photo), (several + scans, several)):  # fmt: skip
        np.testing.assert_array_equal(decode.decode(data), decode.decode(same))
    assert decode.decode(jpeg(500, 8), 1).shape == (8, 8, 1)
    assert decode.decode(with_profiles(1, b"profile")).shape == (8, 8, 3)
    assert decode.decode(b"P2\n# one\n2 1 255\n1 2").shape == (1, 2, 3)


def test_a_limit_is_of_one_thread_and_ends():
    """By pixels times scans, and by file size before anything is read."""
    small, large, many, long = (encode(noise(s, s, 3), "PNG") for s in (10, 11, 8, 30))
    many = jpeg(20, 8)
    with decode_cost.at_most(100, 2000):
        decode.decode(small)
        for data in (large, many, long):
            with pytest.raises(decode_cost.Costly):
                decode.decode(data)
        other = threading.Thread(target=lambda: found.append(decode.decode(large).shape))
        found = []
        other.start()
        other.join()
        assert found == [(11, 11, 3)]
    assert decode.decode(large).shape == (11, 11, 3)


def test_an_image_that_an_op_makes_large_is_costly():
    """A thin image of few pixels, whose enlargement took 0.7 s in a batch of `serve`."""
    thin = noise(50, 1, 3)
    with decode_cost.at_most(100, 2000):
        assert resizing.resize_small(thin[:12], 2).shape == (24, 2, 3)
        for op in (resizing.resize_small, resizing.resize):
            with pytest.raises(decode_cost.Costly):
                op(thin, 11)
        with pytest.raises(decode_cost.Costly):  # the width is resized first
            resizing.resize(thin, 2, 3)
    assert resizing.resize_small(thin, 11).shape == (550, 11, 3)


@pytest.mark.parametrize(("form", "most"), [("PNG", 2), ("WEBP", 1), ("JPEG", 2)])
def test_large_images_are_decoded_one_after_the_other(monkeypatch, form, most):
    """In any threads, so their memory does not add up; small images do not wait for them."""
    monkeypatch.setattr(decode_cost, "_LARGE", 100)
    monkeypatch.setattr(decode_cost, "_MAX_DECODING", 2 * 900)
    loaded, lock, together = decode._load, threading.Lock(), []
    now = {"large": 0}

    def slow(picture, draft):
        large = picture.width == 30
        with lock:
            now["large"] += large
            together.append(now["large"])
        time.sleep(0.02 * large)
        with lock:
            now["large"] -= large
        return loaded(picture, draft)

    monkeypatch.setattr(decode, "_load", slow)
    large, small = encode(noise(30, 30, 3), form), encode(noise(7, 7, 3), form)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        shapes = {image.shape for image in pool.map(decode.decode, [large] * 6)}
    assert (shapes, max(together)) == ({(30, 30, 3)}, most)
    with decode_cost.memory_slot(Image.new("RGB", (60, 60))):  # as large as can be, by one alone
        assert decode.decode(small).shape == (7, 7, 3)
    with pytest.raises(UserError):
        decode.decode(large[: len(large) // 2])
    assert not decode_cost._decoding  # an image that does not decode leaves its room

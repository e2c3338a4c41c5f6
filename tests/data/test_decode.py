"""Host ops: decoding against hand-written files, resizing against its definition, crops against slices."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from cases import noise
from PIL import Image

from imgclf_jax.core import kinds, rng, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.data.decode import FORMATS, HOST_OPS, build, decode
from imgclf_jax.data.resizing import resize


def png(samples, depth, colour, chunks=()):
    """A PNG file written from its specification; `samples` is uint[h, w, c], `chunks` are (type, data) pairs."""
    h, w, _ = samples.shape
    if depth == 16:
        rows = samples.astype(">u2").reshape(h, -1).view(np.uint8)
    else:  # `depth` bits a sample, the first sample in the high bits
        bits = samples.reshape(h, -1, 1) >> np.arange(depth)[::-1] & 1
        rows = np.packbits(bits.reshape(h, -1).astype(np.uint8), axis=1)
    data = zlib.compress(np.insert(rows, 0, 0, axis=1).tobytes())  # each row after its filter type, 0
    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    return png_of([(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")])


def png_of(chunks):
    """A PNG file of (type, data) pairs."""
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encode(picture, form, **options):
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def opaque(pixels):
    return np.dstack([np.broadcast_to(pixels, (*pixels.shape[:2], 3)), np.full(pixels.shape[:2], 255)]).astype(np.uint8)


def luma(rgb):
    return rgb[..., :3].astype(np.float64) @ [[0.299], [0.587], [0.114]]


def worst(a, b):
    """The largest absolute difference between arrays of equal shape."""
    assert a.shape == b.shape
    return np.abs(a.astype(np.float64) - b).max()


G, RGBA, DEEP = noise(5, 7, 1), noise(5, 7, 4), noise(5, 7, 3, high=65536, dtype=np.uint16)
INDEX, COLOURS = noise(5, 7, 1, high=16), noise(16, 4)
PLTE, TRNS = (b"PLTE", COLOURS[:, :3].tobytes()), (b"tRNS", COLOURS[:, 3].tobytes())
PNGS = {  # name → (file, the RGBA pixels that it means)
    "grey": (png(G, 8, 0), opaque(G)),
    "grey 1 bit": (png(G & 1, 1, 0), opaque(G % 2 * 255)),
    "grey 4 bits": (png(G & 15, 4, 0), opaque(G % 16 * 17)),
    "grey 16 bits": (png(DEEP[..., :1], 16, 0), opaque(DEEP[..., :1] // 256)),
    "grey-alpha": (png(RGBA[..., :2], 8, 4), RGBA[..., [0, 0, 0, 1]]),
    "RGB": (png(RGBA[..., :3], 8, 2), opaque(RGBA[..., :3])),
    "RGB 16 bits": (png(DEEP, 16, 2), opaque(DEEP // 256)),
    "RGBA": (png(RGBA, 8, 6), RGBA),
    "palette": (png(INDEX, 8, 3, [PLTE]), opaque(COLOURS[INDEX[..., 0], :3])),
    "palette with alpha": (png(INDEX, 4, 3, [PLTE, TRNS]), COLOURS[INDEX[..., 0]]),
}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", PNGS)
def test_decode_png(name, channels):
    """Every kind of PNG in 1, 3 and 4 channels; grey is ITU-R 601 luma, rounded."""
    file, rgba = PNGS[name]
    out = decode(file, channels)
    assert (out.dtype, out.shape) == (np.uint8, (5, 7, channels))
    expected = luma(rgba) if channels == 1 else rgba[..., :channels]
    assert worst(out, expected) <= (0.51 if channels == 1 else 0)  # the luma is rounded, in fixed point


@pytest.mark.parametrize("form", ["BMP", "WEBP", "TIFF", "PPM", "GIF"])
def test_decode_other_lossless_formats(form):
    """Of an animation the first frame."""
    pixels = np.repeat(G, 3, 2) if form == "GIF" else RGBA[..., :3]
    options = {"WEBP": {"lossless": True},
               "GIF": {"save_all": True, "append_images": [Image.new("L", (7, 5))]}}.get(form, {})  # fmt: skip
    np.testing.assert_array_equal(decode(encode(G if form == "GIF" else pixels, form, **options)), pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_decode_jpeg(channels):
    """Near the original, and within one level of TensorFlow's decoder."""
    ramp = np.stack(np.meshgrid(np.arange(0, 240, 6), np.arange(0, 160, 5)), -1)
    pixels = np.dstack([ramp, 255 - ramp.sum(-1) // 2])[..., :channels].astype(np.uint8)
    file = encode(pixels, "JPEG", quality=95)
    out = decode(file, channels)
    assert worst(out, pixels) <= 8
    assert worst(out, tf.io.decode_jpeg(file, dct_method="INTEGER_ACCURATE").numpy()) <= 1


def test_decode_cmyk_and_lab():
    """CMYK is converted by (1 - ink) (1 - black); LAB without color is grey."""
    cmyk = np.repeat(np.uint8([[10, 200, 90, 40], [0, 60, 250, 0]]), 256, 0).reshape(32, 16, 4)
    out = decode(encode(Image.frombytes("CMYK", (16, 32), cmyk.tobytes()), "JPEG", quality=100), 3)
    expected = (255 - cmyk[..., :3].astype(float)) * (255 - cmyk[..., 3:].astype(float)) / 255
    assert worst(out, expected) <= 4
    file = encode(Image.new("LAB", (4, 4), (200, 128, 128)), "TIFF")
    assert np.ptp(decode(file, 3)) <= 3
    assert worst(decode(file, 1), luma(decode(file, 3))) <= 0.51


# What the EXIF standard says of each orientation: where the stored row 0 and column 0 are seen.
SIDES = {1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
         5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")}  # fmt: skip


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF", pytest.param("HEIF", marks=pytest.mark.skipif(
    "HEIF" not in FORMATS, reason="pillow-heif comes with the extra `heic`"))])  # fmt: skip
@pytest.mark.parametrize("orientation", SIDES)
def test_decode_applies_the_orientation_once(orientation, form):
    stored = np.kron(np.uint8([[0, 50, 100], [150, 200, 250]]), np.ones((16, 16), np.uint8))[..., None]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": {0x0112: orientation}} if form == "TIFF" else {"exif": exif.tobytes(), "quality": 100}
    row, column = SIDES[orientation]
    seen = stored if row in ("top", "bottom") else stored.transpose(1, 0, 2)
    seen = seen[::-1] if "bottom" in (row, column) else seen
    seen = seen[:, ::-1] if "right" in (row, column) else seen
    assert worst(decode(encode(stored.repeat(3, 2), form, **options), 1), seen) < 25


def test_decode_refuses_what_is_no_image():
    jpeg = encode(noise(40, 40, 3), "JPEG")
    for data, message in [
        (b"", "in none of the formats"), (b"hello, world\n" * 9, "in none of the formats"),
        (jpeg[:-200], "does not decode.*truncated"),
        (encode(Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point"),
        (encode(Image.new("I", (4, 4), 65_536), "TIFF"), "more than 16 bits"),
        (encode(Image.new("I", (4, 4), -1), "TIFF"), "more than 16 bits"),
    ]:  # fmt: skip
        for draft in (0, 1):  # the check of files reads a small draft
            with pytest.raises(UserError, match=message):
                decode(data, draft=draft)


def test_decode_of_arrays():
    """An array with the wanted channels is returned unchanged, others are converted; only uint8[h, w, c] is allowed."""
    assert decode(G, 1) is G
    np.testing.assert_array_equal(decode(G, 3), np.repeat(G, 3, 2))
    np.testing.assert_array_equal(decode(RGBA, 3), RGBA[..., :3])
    np.testing.assert_array_equal(decode(RGBA[..., :3], 4), opaque(RGBA[..., :3]))
    np.testing.assert_array_equal(decode(RGBA[..., :2], 1), RGBA[..., :1])  # grey and alpha
    assert worst(decode(RGBA, 1), luma(RGBA)) <= 0.51
    for image in (np.zeros((4, 4, 3), np.float32), noise(4, 4, 5), noise(4, 4)):
        with pytest.raises(UserError, match=r"expected uint8\[h, w, c\]"):
            decode(image, 3)


DRAFTS = {100: (125, 100), 101: (250, 200), 200: (250, 200), 201: (500, 400), 401: (1000, 800), 900: (1000, 800)}


@pytest.mark.parametrize(("draft", "expected"), DRAFTS.items())
def test_draft_is_the_smallest_part_of_a_jpeg_that_is_large_enough(draft, expected):
    """For an image without fine detail the result is close to decoding at full size and resizing."""
    ramp = np.linspace(0, 255, 800)[None, :, None] * np.linspace(0, 1, 1000)[:, None, None] * np.ones(3)
    data = encode(ramp.astype(np.uint8), "JPEG", quality=95)
    image = decode(data, draft=draft)
    assert image.shape == (*expected, 3)
    assert np.abs(image.astype(int) - resize(decode(data), *expected)).max() <= 4


def turned(image):
    """A user's op, which gets an array."""
    assert isinstance(image, np.ndarray)
    return image[::-1]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("op", [
    "resize(20, 31)", "resize(20, method='lanczos')", "resize(20, method='area')", "resize_small(24)",
    "central_crop(21, 17)", "random_resized_crop(24)", "inception_crop(24)",
])  # fmt: skip
def test_ops_give_the_same_for_pillow_images_as_for_arrays(op, channels):
    """A spec passes on Pillow images; the ops, called one by one, take and return arrays."""
    call, seed, position = spec.parse(op)[0], 3, 5
    function = HOST_OPS[call.name]
    for data in (
        encode(noise(45, 61, 3), "JPEG"), encode(noise(45, 61, 4), "PNG"), encode(noise(45, 61, 1), "PNG"),
        encode(noise(45, 61, 1), "TIFF"), encode(Image.fromarray(noise(45, 61, 3)).convert("P"), "GIF"),
        png(noise(45, 61, 3), 8, 2, [(b"tRNS", b"\0\1\0\2\0\3")]),
    ):  # fmt: skip
        generator = rng.generator(seed, f"preprocess/{call.name}/0", position)
        drawn = [generator] if kinds.kind_of(function) == kinds.RANDOM else []
        expected = function(*drawn, decode(data, channels), *call.args, **call.kwargs)
        assert isinstance(expected, np.ndarray)
        found = build(f"decode({channels})|{op}")[0](data, seed, position)
        np.testing.assert_array_equal(found, expected)
        assert found.shape[2] == channels
        mixed = build(f"decode({channels})|{op}|{__name__}:turned|resize(7)")[0](data, seed, position)
        np.testing.assert_array_equal(mixed, resize(expected[::-1], 7))


def test_an_op_that_fails_is_named_unless_it_is_the_users():
    """In training and prediction alike; the user needs the traceback into an op of their own."""
    image = np.zeros((9, 9, 1), np.uint8)
    with pytest.raises(UserError, match=r"^preprocess=\"decode\(1\)\|resize\('a'\)\" fails: "):
        build("decode(1)|resize('a')")[0](image, 0, 0)
    with pytest.raises(TypeError, match="ArrayType"):
        build("decode(1)|numpy:sin('a')")[0](image, 0, 0)

"""Host ops: decoding against hand-written files, resizing against its definition, crops against slices."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, features

from imgclf_jax.core import rng as rngs
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode as ops
from imgclf_jax.data.decode import central_crop, decode, random_resized_crop, resize, resize_small


def noise(*shape, high=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, high, shape, dtype)


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
    out = b"\x89PNG\r\n\x1a\n"
    for name, body in [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]:
        out += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return out


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
    """The greatest difference, of arrays of the same shape."""
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
    """Every kind of PNG in 1, 3 and 4 channels; grey is the luma of ITU-R 601, rounded."""
    file, rgba = PNGS[name]
    out = decode(file, channels)
    assert (out.dtype, out.shape) == (np.uint8, (5, 7, channels))
    expected = luma(rgba) if channels == 1 else rgba[..., :channels]
    assert worst(out, expected) <= (0.51 if channels == 1 else 0)  # the luma is rounded, in fixed point


@pytest.mark.parametrize("form", ["BMP", "WEBP", "TIFF", "PPM", "GIF"])
def test_decode_other_lossless_formats(form):
    pixels = np.repeat(G, 3, 2) if form == "GIF" else RGBA[..., :3]
    options = {"lossless": True} if form == "WEBP" else {}
    file = encode(G if form == "GIF" else pixels, form, **options)
    np.testing.assert_array_equal(decode(file), pixels)


def test_decode_takes_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    file = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(file)).n_frames == 3
    assert np.unique(decode(file).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


@pytest.mark.parametrize("channels", [1, 3])
def test_decode_jpeg(channels):
    """Near the original, and within one level of what TensorFlow's decoder gives."""
    ramp = np.stack(np.meshgrid(np.arange(0, 240, 6), np.arange(0, 160, 5)), -1)
    pixels = np.dstack([ramp, 255 - ramp.sum(-1) // 2])[..., :channels].astype(np.uint8)
    file = encode(pixels, "JPEG", quality=95)
    out = decode(file, channels)
    assert worst(out, pixels) <= 8
    assert worst(out, tf.io.decode_jpeg(file, dct_method="INTEGER_ACCURATE").numpy()) <= 1


def test_decode_cmyk_and_lab():
    """CMYK is ink to light, (1 - ink) (1 - black); LAB without colour is grey."""
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


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", SIDES)
def test_decode_applies_the_exif_orientation(orientation, form):
    blocks = np.uint8([[0, 50, 100], [150, 200, 250]])
    stored = np.kron(blocks, np.ones((8, 8), np.uint8))[..., None]
    tiff = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x112, 3, 1, orientation, 0) + bytes(4)
    if form == "PNG":
        file = png(stored, 8, 0, [(b"eXIf", tiff)])
    else:
        plain = encode(stored, "JPEG", quality=100)
        body = b"Exif\0\0" + tiff
        file = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]
    row, column = SIDES[orientation]
    seen = stored if row in ("top", "bottom") else stored.transpose(1, 0, 2)
    seen = seen[::-1] if "bottom" in (row, column) else seen
    seen = seen[:, ::-1] if "right" in (row, column) else seen
    assert worst(decode(file, 1), seen) <= (0 if form == "PNG" else 2)


def test_decode_refuses_what_is_no_image():
    jpeg = encode(noise(40, 40, 3), "JPEG")
    for data in (b"", b"hello, world\n" * 9, jpeg[:2]):
        with pytest.raises(UserError, match="not in an image format"):
            decode(data)
    for length in (len(jpeg) // 2, len(jpeg) - 200):
        with pytest.raises(UserError, match=r"does not decode.*truncated"):
            decode(jpeg[:length])
    with pytest.raises(UserError, match="floating-point"):
        decode(encode(Image.new("F", (4, 4), 0.5), "TIFF"))
    with pytest.raises(UserError, match="more than 16 bits"):
        decode(encode(Image.new("I", (4, 4), 1 << 20), "TIFF"))
    with pytest.raises(UserError, match=r"channels=2.*1, 3, 4"):
        decode(jpeg, 2)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF"])
def test_decode_of_a_damaged_file_is_an_image_or_a_user_error(form):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    whole = encode(noise(12, 9, 3), form)
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = np.frombuffer(whole, np.uint8).copy()
        data[generator.integers(0, min(len(data), 200), 3)] = generator.integers(0, 256, 3)
        try:
            out = decode(data.tobytes(), int(generator.choice([1, 3, 4])))
        except UserError:
            refused += 1
        else:
            assert (out.dtype, out.ndim) == (np.uint8, 3)
    assert refused > 0


def test_decode_of_arrays():
    """An array with the wanted channels is passed through; another is converted; no array but uint8[h, w, c]."""
    for image, channels in ((G, 1), (RGBA[..., :3], 3), (RGBA, 4)):
        assert decode(image, channels) is image
    np.testing.assert_array_equal(decode(G, 3), np.repeat(G, 3, 2))
    np.testing.assert_array_equal(decode(RGBA, 3), RGBA[..., :3])
    np.testing.assert_array_equal(decode(RGBA[..., :3], 4), opaque(RGBA[..., :3]))
    np.testing.assert_array_equal(decode(RGBA[..., :2], 1), RGBA[..., :1])  # grey and alpha
    assert worst(decode(RGBA, 1), luma(RGBA)) <= 0.51
    for image in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 1), np.uint16), noise(4, 4, 5), noise(4, 4)):
        with pytest.raises(UserError, match=r"expected uint8\[h, w, c\]"):
            decode(image, 3)


KERNELS = {  # method → (half its width, the kernel)
    "bilinear": (1, lambda x: 1 - x),
    "bicubic": (2, lambda x: np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)),
    "lanczos": (3, lambda x: np.sinc(x) * np.sinc(x / 3)),
}


def filtered(image, size, method, axis):
    """Each output pixel is the mean of the input, weighted by the kernel about its centre, widened when shrinking."""
    (support, kernel), n = KERNELS[method], image.shape[axis]
    centres = (np.arange(size) + 0.5) * n / size
    x = np.abs(np.arange(n) + 0.5 - centres[:, None]) / max(1, n / size)  # [size, n]
    weights = np.where(x < support, kernel(x), 0)
    weights /= weights.sum(1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)


@pytest.mark.parametrize("sizes", [((17, 23), (8, 9)), ((9, 11), (20, 31)), ((30, 7), (7, 30)), ((1, 9), (3, 4))])
@pytest.mark.parametrize("method", KERNELS)
def test_resize_is_the_antialiased_filter(method, sizes):
    """Against the definition, and TensorFlow, up to rounding; filters that overshoot get greys that they can't clip."""
    old, new = sizes
    for channels in (1, 3):
        image = noise(*old, channels) if method == "bilinear" else noise(*old, channels, high=96) + np.uint8(80)
        out = resize(image, *new, method)
        expected = filtered(filtered(image.astype(np.float64), new[1], method, 1), new[0], method, 0)
        assert worst(out, expected) <= (1 if method == "bilinear" else 1.5)
        if method == "bilinear":
            assert worst(out, tf.image.resize(image, new, antialias=True).numpy()) <= 1


def test_resize_nearest_rgba_and_refusal():
    image = noise(9, 14, 3)
    rows, columns = (np.floor((np.arange(6) + 0.5) * n / 6).astype(int) for n in (9, 14))
    np.testing.assert_array_equal(resize(image, 6, method="nearest"), image[rows][:, columns])
    assert resize(image, 9, 14) is image
    image = np.tile(np.uint8([(255, 0, 0, 255), (0, 255, 0, 0)]), (4, 2, 1))  # opaque red, transparent green
    np.testing.assert_allclose(resize(image, 1)[0, 0], (255, 0, 0, 127.5), rtol=0, atol=1)  # only the red is seen
    with pytest.raises(UserError, match=r"'box'.*bilinear"):
        resize(image, 6, method="box")


@pytest.mark.parametrize(("h", "w"), [(30, 40), (40, 30), (33, 100), (7, 7), (1, 9)])
@pytest.mark.parametrize("size", [5, 15, 20])
def test_resize_small(h, w, size):
    """The shorter side is `size`, the longer one nearest to the same aspect ratio; the pixels are resize's."""
    image = noise(h, w, 3)
    out = resize_small(image, size)
    assert min(out.shape[:2]) == size
    assert abs(max(out.shape[:2]) - size * max(h, w) / min(h, w)) <= 0.5
    assert (out.shape[0] <= out.shape[1]) == (h <= w)
    np.testing.assert_array_equal(out, resize(image, *out.shape[:2]))


def test_central_crop():
    image = noise(8, 9, 3)
    np.testing.assert_array_equal(central_crop(image, 4, 5), image[2:6, 2:7])
    np.testing.assert_array_equal(central_crop(image, 5), image[1:6, 2:7])  # of the odd margin 3, 1 is above
    np.testing.assert_array_equal(central_crop(image, 8, 9), image)
    for height, width in ((9, 4), (4, 10)):
        with pytest.raises(UserError, match=rf"central_crop\({height}, {width}\) of an image of 8 by 9"):
            central_crop(image, height, width)


def measured_crop(seed, h, w, **options):
    """Where the crop was: (top, left, height, width), read off an image whose pixels tell their place."""
    y, x = np.mgrid[:h, :w].astype(np.uint8)
    out = random_resized_crop(np.random.default_rng(seed), np.dstack([y, x, y]), 256, method="nearest", **options)
    (top, left), (bottom, right) = out[0, 0, :2].astype(int), out[-1, -1, :2].astype(int)
    return int(top), int(left), int(bottom - top + 1), int(right - left + 1)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_random_resized_crop_is_pillows_crop_and_resize(method):
    """The pixels of the crop that the generator's draws mean: area, log ratio, top, left, in that order."""
    image, h, w = noise(40, 60, 3), 40, 60
    for seed in range(20):
        generator = np.random.default_rng(seed)
        while True:
            area = generator.uniform(0.08, 1.0) * h * w
            aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
            crop_h, crop_w = int(np.rint(np.sqrt(area / aspect))), int(np.rint(np.sqrt(area * aspect)))
            if crop_h <= h and crop_w <= w:
                break
        top, left = generator.integers(0, h - crop_h + 1), generator.integers(0, w - crop_w + 1)
        picture = Image.fromarray(image).crop((left, top, left + crop_w, top + crop_h))
        expected = np.asarray(picture.resize((24, 16), Image.Resampling[method.upper()]))
        got = random_resized_crop(np.random.default_rng(seed), image, 16, 24, method=method)
        np.testing.assert_array_equal(got, expected)


def test_random_resized_crop_has_the_distribution_that_it_says():
    """Area uniform in `scale`, ratio log-uniform in `ratio`, place uniform: ranges, means and quartiles."""
    n, side = 1000, 200
    crops = [measured_crop(seed, side, side, scale=(0.2, 0.6), ratio=(3 / 4, 4 / 3)) for seed in range(n)]
    top, left, h, w = np.array(crops, float).T
    uniforms = {  # each is uniform in [0, 1], up to the rounding of the sides to whole pixels
        "area": (h * w / side**2 - 0.2) / 0.4,
        "ratio": (np.log(w / h) / np.log(4 / 3) + 1) / 2,
        "top": (top + 0.5) / (side - h + 1),
        "left": (left + 0.5) / (side - w + 1),
    }
    for name, u in uniforms.items():
        assert -0.03 < u.min() <= u.max() < 1.03, name
        assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / n), name
        assert abs((u < 0.25).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / n), name


def test_random_resized_crop_falls_back_to_the_largest_central_crop():
    """Twice the image's area fits nowhere."""
    for h, w, ratio, crop in (
        (10, 100, (3 / 4, 4 / 3), (0, 43, 10, 13)),  # too wide: 10 * 4 / 3 columns, in the middle
        (100, 10, (3 / 4, 4 / 3), (43, 0, 13, 10)),
        (50, 60, (3 / 4, 4 / 3), (0, 0, 50, 60)),  # within `ratio`: the whole image
        (1, 10, (0.1, 0.3), (0, 4, 1, 1)),  # never less than a pixel
    ):
        assert measured_crop(0, h, w, scale=(2.0, 2.0), ratio=ratio) == crop


def test_random_resized_crop_is_a_function_of_the_position():
    image = noise(32, 32, 3)
    a, again, b = (random_resized_crop(rngs.generator(1, "crop", p), image, 16) for p in (5, 5, 6))
    np.testing.assert_array_equal(a, again)
    assert (a != b).any()


def test_build_applies_the_ops_in_order_each_with_a_generator_of_its_name():
    file = encode(noise(20, 30, 3), "PNG")
    plain, draws = ops.build("decode(3)|resize_small(10)|central_crop(8, 12)")
    np.testing.assert_array_equal(plain(file, 7, 3), resize_small(noise(20, 30, 3), 10)[1:9, 1:13])
    assert not draws
    random, draws = ops.build("decode(3)|random_resized_crop(8)|random_resized_crop(6)")
    first, second = (rngs.generator(7, f"preprocess/random_resized_crop/{i}", 3) for i in range(2))
    once = random_resized_crop(first, noise(20, 30, 3), 8)
    np.testing.assert_array_equal(random(file, 7, 3), random_resized_crop(second, once, 6))
    assert draws


def test_build_refuses_a_wrong_spec():
    for text, message in (
        ("", "first op must be decode"),
        ("decode(3)|resiz(8)", "unknown host op 'resiz': did you mean 'resize'"),
        ("decode(3)|resize(8, mthod='nearest')", "unknown argument 'mthod': did you mean 'method'"),
        ("decode(3)|resize", "height"),
    ):
        with pytest.raises(UserError, match=message):
            ops.build(text)

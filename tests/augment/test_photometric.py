"""Changes of brightness and color, and policies of augmentation: every op against Pillow, and the random draws."""

import colorsys
from collections import Counter

import jax
import numpy as np
import pytest
from cases import thorough
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from sklearn.datasets import load_sample_image

from imgclf_jax.augment import photometric, policies

FACTORS = [0.0, 0.01, 0.1, 0.37, 0.5, 0.73, 0.99, 1.0, 1.01, 1.27, 1.5, 1.9, 1.99, 3.7]


def photos(size):
    """Parts of scikit-learn's two photographs, one of them reduced: uint8[5, size, size, 3]."""
    china, flower = load_sample_image("china.jpg"), load_sample_image("flower.jpg")
    small = np.asarray(Image.fromarray(flower).resize((size, size)))
    places = ((china, 0, 0), (china, 150, 300), (flower, 200, 250), (china, 203, 100))
    parts = [p[y : y + size, x : x + size] for p, y, x in places]
    return np.stack([*parts[:3], small, parts[3]])


def unusual(size, channels):
    """Constant, black and white, a narrow range, a ramp, one odd pixel, noise."""
    rng = np.random.default_rng(1)
    images = np.zeros((8, size, size, channels), np.uint8)
    images[1], images[2] = 255, 77
    images[3] = rng.integers(0, 2, images[3].shape) * 255
    images[4] = rng.integers(100, 120, images[4].shape)
    images[5] = np.linspace(0, 255, size)[:, None, None]
    images[6] = 200
    images[6, 0, 0] = 3
    images[7] = rng.integers(0, 256, images[7].shape)
    return images


SETS = {"large": photos(224), "unusual": unusual(17, 3), "tiny": unusual(2, 3), "grey": unusual(9, 1)}


@pytest.fixture(scope="module", params=SETS)
def images(request):
    return SETS[request.param]


def picture(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def by_pillow(change, images):
    return np.stack([np.asarray(change(picture(image))) for image in images]).reshape(images.shape)


ENHANCE = {name: getattr(ImageEnhance, name.title()) for name in ("brightness", "contrast", "color", "sharpness")}


def sharpen(images, factor):
    return photometric.blend(photometric.smooth(images), images, factor)


@pytest.mark.parametrize("name", ENHANCE)
def test_enhancements_are_pillows(images, name):
    """At factor 0 black, the mean level, the grey and the smooth image; `test_policies` has the pointwise ops."""
    op = jax.jit(getattr(photometric, name, sharpen))
    for factor in FACTORS:
        expected = by_pillow(lambda p, f=factor: ENHANCE[name](p).enhance(f), images)
        np.testing.assert_array_equal(op(images, np.full(len(images), factor, np.float32)), expected)


def test_equalize_is_pillows(images):
    equalize = jax.jit(lambda x: photometric.lookup(x, photometric.equalization(x)))
    np.testing.assert_array_equal(equalize(images), by_pillow(ImageOps.equalize, images))


def test_autocontrast_is_the_exact_quotient(images):
    """In integers; Pillow's float64 may be a level lower where the quotient is whole, and nowhere else."""
    x = images.astype(int)
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    span = np.maximum(high - low, 1)
    expected = np.where(high > low, 255 * (x - low) // span, x)
    out = np.asarray(jax.jit(lambda x: photometric.stretch(x, *photometric.extremes(x)))(images)).astype(int)
    np.testing.assert_array_equal(out, expected)
    lower = out - by_pillow(ImageOps.autocontrast, images).astype(int)
    assert set(np.unique(lower)) <= {0, 1}
    assert (255 * (x - low) % span == 0)[lower == 1].all()


def by_colorsys(images, shift):
    """The pixels, [..., 3] of 0 to 255, with their hue turned by `shift` of a full turn, not rounded."""

    def turn(pixel):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
        return 255 * np.array(colorsys.hsv_to_rgb((h + shift) % 1, s, v))

    return np.apply_along_axis(turn, -1, images)


@pytest.mark.parametrize("shift", [-0.5, -0.31, 0.0, 0.1, 1 / 3, 0.5])
def test_hue_turns_as_colorsys_does(shift):
    """Within half a level of the exact value, however it is rounded."""
    images = np.concatenate([photos(12), unusual(12, 3)])
    out = np.asarray(jax.jit(photometric.hue)(images, np.full(len(images), shift, np.float32)))
    assert np.abs(out - by_colorsys(images, shift)).max() <= 0.5 + 1e-3
    if shift == 0:
        np.testing.assert_array_equal(out, images)


KEY = jax.random.key(11)


def affine(image, matrix, fill=0):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=fill)


def op_by_pillow(image, op, magnitude, top, fill=0):
    """One op as torchvision's policies define it, written from their text; `magnitude` signed, out of 30; `top` the
    greatest strengths: shear, translation in pixels (x, y), degrees, factor, bits."""
    part = magnitude / 30
    shear, (x, y), degrees, factor, bits = top
    if op in ENHANCE:
        return ENHANCE[op](image).enhance(1 + part * factor)
    return {
        "identity": lambda: image,
        "shear_x": lambda: affine(image, (1, part * shear, 0, 0, 1, 0), fill),
        "shear_y": lambda: affine(image, (1, 0, 0, part * shear, 1, 0), fill),
        "translate_x": lambda: affine(image, (1, 0, int(part * x), 0, 1, 0), fill),
        "translate_y": lambda: affine(image, (1, 0, 0, 0, 1, int(part * y)), fill),
        "rotate": lambda: image.rotate(part * degrees, fillcolor=fill),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(abs(part) * bits)),
        "solarize": lambda: ImageOps.solarize(image, 256 - 256 * abs(part)),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[op]()


def wide(h, w):
    return policies.Ranges(0.99, 32.0, 32.0, 135.0, 0.99, 6), (0.99, (32, 32), 135, 0.99, 6)


def narrow(h, w):
    x, y = 150 / 331 * w, 150 / 331 * h
    return policies.Ranges(0.3, x, y, 30.0, 0.9, 4), (0.3, (x, y), 30, 0.9, 4)


IMAGES = {"colour": photos(32), "oblong": photos(40)[:, 3:26], "grey": photos(24)[..., 1:2]}
APPLY = jax.jit(lambda x, op, fill, *drawn: policies.apply(x, op, policies.Strengths(*drawn), fill))


def everything(ranges, image, fill=0):
    """[(op, signed magnitude, image)] for all ops, signs and magnitudes."""
    table = policies.strengths(ranges, *image.shape[:2])
    place = tuple(v.ravel() for v in np.meshgrid(np.arange(14), [0, 1], np.arange(31), indexing="ij"))
    fill = np.broadcast_to(np.asarray(fill, np.uint8), image.shape[-1:])
    out = np.asarray(APPLY(np.stack([image] * 868), place[0], fill, *(np.asarray(v)[place] for v in table)))
    return [(policies.OPS[op], (1 - 2 * sign) * m, own) for op, sign, m, own in zip(*place, out, strict=True)]


@pytest.mark.parametrize("space", [narrow, *thorough(wide)])
@pytest.mark.parametrize("kind", [*list(IMAGES)[:1], *thorough(*list(IMAGES)[1:])])
def test_every_op_is_pillows_at_every_magnitude(space, kind):
    """Bit for bit, except autocontrast, where Pillow may be a level lower."""
    image = IMAGES[kind][3]
    h, w, c = image.shape
    ranges, top = space(h, w)
    fill = (10, 128, 255)[:c] if c == 3 else 77
    for op, magnitude, own in everything(ranges, image, fill):
        expected = np.asarray(op_by_pillow(picture(image), op, magnitude, top, fill)).reshape(h, w, c)
        difference = own.astype(int) - expected
        lowest = 1 if op == "autocontrast" else 0
        assert set(np.unique(difference)) <= {0, lowest}, (op, magnitude)


def drawn(apply, n, images):
    """How often each (op, sign, magnitude) was drawn, recognized by its output, among outputs that differ."""
    out = np.asarray(jax.jit(apply)(KEY, np.broadcast_to(images, (n, *images.shape))))
    return Counter(image.tobytes() for image in out)


@pytest.mark.thorough
def test_trivialaugment_draws_every_op_sign_and_magnitude_alike():
    """The share of each outcome follows the number of draws that lead to it."""
    image = photos(16)[0]
    shares = Counter(out.tobytes() for _, _, out in everything(wide(16, 16)[0], image))
    n = 15_000
    counts = drawn(policies.trivialaugment, n, image)
    assert set(counts) <= set(shares)
    expected = np.array([shares[k] / 868 * n for k in shares])
    observed = np.array([counts[k] for k in shares])
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.thorough
def test_randaugment_draws_the_ops_of_its_magnitude():
    """On an oblong image, where translations differ by axis; whose ops are Pillow's, see above."""
    image = IMAGES["oblong"][3]
    table = everything(narrow(*image.shape[:2])[0], image)
    counts = drawn(lambda key, x: policies.randaugment(key, x, 1, 30), 60, image)
    assert counts.keys() <= {own.tobytes() for _, magnitude, own in table if abs(magnitude) == 30}
    assert len(counts) > 10


@pytest.mark.thorough
def test_magnitude_std_spreads_the_magnitude():
    """A solarized ramp reveals the magnitude: the normal draw, rounded and clipped to 0 to 30."""
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    _, top = narrow(16, 16)
    solarized = {m: np.asarray(op_by_pillow(picture(image), "solarize", m, top)).tobytes() for m in range(31)}
    assert len(set(solarized.values())) == 31
    counts = drawn(lambda key, x: policies.randaugment(key, x, 1, 9, magnitude_std=2.0), 15_000, image)
    seen = {m: counts.get(solarized[m], 0) for m in (6, 7, 8, 9, 10, 11, 12)}
    inside = np.array([stats.norm.cdf((m + 0.5 - 9) / 2) - stats.norm.cdf((m - 0.5 - 9) / 2) for m in seen])
    assert stats.chisquare(list(seen.values()), inside / inside.sum() * sum(seen.values())).pvalue > 1e-3
    assert sum(seen.values()) > 800


def test_color_jitter_is_its_ops_in_order():
    images = photos(16)
    out = jax.jit(lambda x: policies.color_jitter(KEY, x, 0.4, (0.2, 3.0), 0.9, 0.3))(images)
    ranges = [(0.6, 1.4), (0.2, 3.0), (0.1, 1.9), (-0.3, 0.3)]
    values = [
        np.asarray(jax.random.uniform(jax.random.fold_in(KEY, i), (5,), minval=low, maxval=high))
        for i, (low, high) in enumerate(ranges)
    ]
    for image, own, *factors in zip(images, np.asarray(out), *values, strict=True):
        p = picture(image)
        ops = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for op, factor in zip(ops, factors, strict=False):
            p = op(p).enhance(float(factor))
        assert np.abs(own - by_colorsys(np.asarray(p), float(factors[3]))).max() <= 0.5 + 1e-3

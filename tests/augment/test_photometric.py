"""Changes of brightness and color against Pillow, on random, real and extreme images."""

import colorsys

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from imgclf_jax.augment import photometric

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

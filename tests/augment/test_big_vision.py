"""RandAugment of big_vision: every op against its definition in NumPy and TensorFlow's kernel, and its random draws."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from cases import thorough
from scipy import stats
from test_photometric import photos, unusual

from imgclf_jax.augment import big_vision, ops, photometric

KEY = jax.random.key(4)
GREY = 128
MOVES = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}  # those whose sign is drawn
IMAGES = {"photos": photos(32), "oblong": photos(40)[:, 3:26], "unusual": unusual(17, 3)}


def definition(name, image, magnitude, sign=1, centre=(0, 0)):
    """One op on uint8[h, w, 3], after the text of pp/autoaugment.py: `level_to_arg`, and the function of each name."""
    part, (h, w, _) = magnitude / 10, image.shape
    x = image.astype(np.float32)
    factor = np.float32(part * 1.8 + 0.1)
    match name:
        case "autocontrast":
            low, high = x.min((0, 1)), x.max((0, 1))
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = np.float32(255) / (high - low)
                stretched = x * scale + -low * scale
            return np.where(high > low, np.clip(np.where(high > low, stretched, 0), 0, 255).astype(np.uint8), image)
        case "equalize":
            return np.stack([equalized(image[..., i]) for i in range(3)], -1)
        case "invert":
            return 255 - image
        case "posterize":
            shift = min(8 - int(part * 4), 7)  # of a byte no more than 7 bits are shifted out
            return image >> shift << shift
        case "solarize":
            threshold = np.array(int(part * 256)).astype(np.uint8)  # 256 is 0 in the image's type
            return np.where(image < threshold, image, 255 - image)
        case "solarize_add":
            return np.where(image < 128, np.clip(image.astype(int) + int(part * 110), 0, 255), image).astype(np.uint8)
        case "color":
            grey = (image @ np.array([0.2989, 0.587, 0.114]) * (255.5 / 255) + 1e-9).astype(np.uint8)
            return blended(grey[..., None], x, factor)
        case "contrast":  # a histogram's mean count, where its mean level was meant
            return blended(np.uint8(min(h * w / 256, 255)), x, factor)
        case "brightness":
            return blended(np.uint8(0), x, factor)
        case "sharpness":
            return blended(smooth(image), x, factor)
        case "cutout":
            out, side = image.copy(), int(part * 40)
            top, left = (max(at - side, 0) for at in centre)
            out[top : max(centre[0] + side, 0), left : max(centre[1] + side, 0)] = GREY
            return out
    angle = np.float32(sign * part * 30) * np.float32(math.pi / 180)
    cos, sin = np.cos(angle), np.sin(angle)
    dx, dy = (w - 1 - (cos * (w - 1) - sin * (h - 1))) / 2, (h - 1 - (sin * (w - 1) + cos * (h - 1))) / 2
    maps = {
        "rotate": (cos, -sin, dx, sin, cos, dy),
        "shear_x": (1, sign * part * 0.3, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * part * 0.3, 1, 0),
        "translate_x": (1, 0, sign * part * 100, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * part * 100),
    }
    return projected(image, maps[name])


def blended(degenerate, x, factor):
    low = degenerate.astype(np.float32)
    return np.clip(low + factor * (x - low), 0, 255).astype(np.uint8)


def smooth(image):
    h, w, _ = image.shape
    total = 4 * image.astype(int)[1:-1, 1:-1]
    for dy in range(3):
        for dx in range(3):
            total += image[dy : h - 2 + dy, dx : w - 2 + dx]
    out = image.copy()
    out[1:-1, 1:-1] = total // 13
    return out


def equalized(channel):
    counts = np.bincount(channel.ravel(), minlength=256)
    step = (counts.sum() - counts[counts > 0][-1]) // 255
    if step == 0:
        return channel
    table = np.concatenate([[0], (np.cumsum(counts) + step // 2)[:-1] // step])
    return np.clip(table, 0, 255).astype(np.uint8)[channel]


def projected(image, matrix):
    """By the kernel that TensorFlow Addons calls, with a channel of ones that marks what lies inside."""
    wrapped = np.concatenate([image, np.ones_like(image[..., :1])], -1)
    out = tf.raw_ops.ImageProjectiveTransformV3(
        images=wrapped[None], transforms=np.array([(*matrix, 0, 0)], np.float32), output_shape=image.shape[:2],
        interpolation="NEAREST", fill_mode="CONSTANT", fill_value=0.0,
    ).numpy()[0]  # fmt: skip
    return np.where(out[..., 3:] == 0, np.uint8(GREY), out[..., :3])


@pytest.mark.parametrize("magnitude", [10, *thorough(0, 1, 4, 5, 9)])
@pytest.mark.parametrize("kind", IMAGES)
def test_every_op_is_the_definition(kind, magnitude):
    """Bit for bit: all ops, both signs, each image with its own cutout."""
    rng, image = np.random.default_rng(0), IMAGES[kind]
    n, h, w, c = image.shape
    place = [(op, negative, i) for op in big_vision.OPS for negative in range(2) for i in range(n)]
    op, negative, which = (np.array(v) for v in zip(*place, strict=True))
    centre = rng.integers(0, h, len(place)), rng.integers(0, w, len(place))
    number = np.array([big_vision.OPS.index(name) for name in op])
    apply = jax.jit(big_vision.apply, static_argnums=4)
    fill = jnp.full(c, GREY, jnp.uint8)
    out = np.asarray(apply(image[which], number, negative, tuple(map(jnp.asarray, centre)), magnitude, fill))
    for name, sign, i, y, x, own in zip(op, 1 - 2 * negative, which, *centre, out, strict=True):
        expected = definition(name, image[i], magnitude, sign if name in MOVES else 1, (y, x))
        np.testing.assert_array_equal(own, expected, f"{name} {sign}")


def test_the_grey_image_is_that_of_tensorflow():
    """Except for levels so close to a whole one that float32 cannot distinguish them."""
    image = np.random.default_rng(0).integers(0, 256, (1, 500, 500, 3), np.uint8)
    theirs = tf.image.rgb_to_grayscale(image).numpy().astype(int)
    exact = image @ np.array([0.2989, 0.587, 0.114]) * (255.5 / 255)
    wrong = np.asarray(photometric.grey(jnp.asarray(image), tensorflow=True))[..., 0] != theirs[..., 0]
    assert np.abs(exact - np.rint(exact))[wrong].max(initial=0) < 1e-4
    assert wrong.mean() < 1e-4


@pytest.mark.thorough
def test_ops_signs_and_cutouts_are_drawn_alike():
    """Each op in 1 of 16, each sign in half of these, recognized by the output."""
    image, n = photos(32)[0], 12_000
    apply = ops.build("randaugment(1, 3, ops='big_vision')", train=True)
    out = np.rint(np.asarray(jax.jit(apply)(KEY, jnp.asarray(np.broadcast_to(image, (n, *image.shape))))) * 255)
    expected = Counter()
    for name in big_vision.OPS:
        for sign in (1, -1):
            if name != "cutout":
                expected[definition(name, image, 3, sign if name in MOVES else 1).tobytes()] += n / 32
    keys = [own.astype(np.uint8).tobytes() for own in out]
    counts = Counter(keys)
    seen = [counts[key] for key in expected]
    cutouts = sum(key not in expected for key in keys)
    assert stats.chisquare([*seen, cutouts], [*expected.values(), n / 16]).pvalue > 1e-3

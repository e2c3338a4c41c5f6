"""Host ops that change the size, against Pillow and their definitions."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_decode import encode, noise, worst

from imgclf_jax.core import rng as rngs
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode as ops
from imgclf_jax.data.resizing import central_crop, random_resized_crop, resize, resize_small


@pytest.mark.parametrize("sizes", [((17, 23), (8, 9)), ((9, 11), (20, 31)), ((30, 7), (7, 30)), ((1, 9), (3, 4))])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_tensorflows_with_antialiasing(channels, sizes):
    image = noise(*sizes[0], channels)
    assert worst(resize(image, *sizes[1]), tf.image.resize(image, sizes[1], antialias=True).numpy()) <= 1


def test_resize_nearest_rgba_and_refusal():
    image = noise(9, 14, 3)
    rows, columns = (np.floor((np.arange(6) + 0.5) * n / 6).astype(int) for n in (9, 14))
    np.testing.assert_array_equal(resize(image, 6, method="nearest"), image[rows][:, columns])
    assert resize(image, 9, 14) is image
    image = np.tile(np.uint8([(255, 0, 0, 255), (0, 255, 0, 0)]), (4, 2, 1))  # opaque red, transparent green
    np.testing.assert_allclose(resize(image, 1)[0, 0], (255, 0, 0, 127.5), rtol=0, atol=1)  # only the red is seen
    with pytest.raises(UserError, match=r"'box'.*bilinear"):
        resize(image, 6, method="box")


@pytest.mark.parametrize(("h", "w"), [(30, 40), (40, 30), (33, 100), (1, 9)])
def test_resize_small(h, w):
    """The shorter side becomes `size`, the longer one keeps the aspect ratio best; the pixels are those of `resize`."""
    image = noise(h, w, 3)
    for size in (5, 15, 20):
        out = resize_small(image, size)
        assert min(out.shape[:2]) == out.shape[0 if h <= w else 1] == size
        assert abs(max(out.shape[:2]) - size * max(h, w) / min(h, w)) <= 0.5
        np.testing.assert_array_equal(out, resize(image, *out.shape[:2]))


def test_central_crop():
    image = noise(8, 9, 3)
    np.testing.assert_array_equal(central_crop(image, 4, 5), image[2:6, 2:7])
    np.testing.assert_array_equal(central_crop(image, 5), image[1:6, 2:7])  # of the odd margin 3, 1 is above
    np.testing.assert_array_equal(central_crop(image, 8, 9), image)


# (height, width, both after torchvision 0.28's Resize(256), top and left of CenterCrop(224)), as it gave them.
TORCHVISION = [
    (326, 569, 256, 446, 16, 111), (894, 424, 539, 256, 158, 16), (71, 295, 256, 1063, 16, 420),
    (777, 363, 547, 256, 162, 16), (255, 410, 256, 411, 16, 94), (256, 256, 256, 256, 16, 16),
]  # fmt: skip


@pytest.mark.parametrize(("h", "w", "new_h", "new_w", "top", "left"), TORCHVISION)
def test_sizes_and_places_of_torchvision(h, w, new_h, new_w, top, left):
    """With these, the pixels are Pillow's, as in torchvision."""
    image = noise(h, w, 3)
    small = resize_small(image, 256, like="torchvision")
    np.testing.assert_array_equal(small, resize(image, new_h, new_w))
    crop = central_crop(small, 224, like="torchvision")
    np.testing.assert_array_equal(crop, small[top : top + 224, left : left + 224])


def measured_crop(seed, h, w, **options):
    """The crop (top, left, height, width), read from an image whose pixels encode their position."""
    y, x = np.mgrid[:h, :w].astype(np.uint8)
    out = random_resized_crop(np.random.default_rng(seed), np.dstack([y, x, y]), 256, method="nearest", **options)
    (top, left), (bottom, right) = out[0, 0, :2].astype(int), out[-1, -1, :2].astype(int)
    return int(top), int(left), int(bottom - top + 1), int(right - left + 1)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_random_resized_crop_is_pillows_crop_and_resize(method):
    """The crop follows from the generator's draws of area, log ratio, top and left, in this order."""
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


def test_random_resized_crop_falls_back_to_the_largest_central_crop():
    """Since all of the image's area fits in no other shape."""
    for h, w, ratio, crop in (
        (10, 100, (3 / 4, 4 / 3), (0, 43, 10, 13)),  # too wide: 10 * 4 / 3 columns, in the middle
        (100, 10, (3 / 4, 4 / 3), (43, 0, 13, 10)),
        (50, 60, (3 / 4, 4 / 3), (0, 0, 50, 60)),  # within `ratio`: the whole image
        (1, 10, (0.1, 0.3), (0, 4, 1, 1)),  # never less than a pixel
    ):
        assert measured_crop(0, h, w, scale=(1.0, 1.0), ratio=ratio) == crop


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

"""Host ops that change the size, against Pillow and their definitions."""

import numpy as np
import pytest
import tensorflow as tf
from cases import thorough
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_image
from test_decode import encode, noise, worst

from imgclf_jax.core import rng as rngs
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode, resizing
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


def darker(image, by=2):
    """A user's deterministic host op."""
    return image // np.uint8(by)


@pytest.mark.parametrize(("preprocess", "expected"), [
    ("decode(3)|random_resized_crop(224)", "decode(3)|resize_small(256)|central_crop(224)"),
    ("decode(3)|random_resized_crop(32, scale=(0.5, 1.0))", "decode(3)|resize_small(37)|central_crop(32)"),
    ("decode(1)|random_resized_crop(height=8, width=12, method='bicubic')",
     "decode(1)|resize_small(14, method='bicubic')|central_crop(8, 12)"),
    (f"decode(3)|random_resized_crop(16)|{__name__}:darker(by=3)",
     f"decode(3)|resize_small(18)|central_crop(16)|{__name__}:darker(by=3)"),
    ("decode(3)|resize( 8,6 )", "decode(3)|resize( 8,6 )"),  # as it is written
])  # fmt: skip
def test_an_empty_key_follows_preprocess(preprocess, expected):
    """With the same shape, for images of any shape, and without random draws."""
    assert decode.evaluation_spec("", preprocess) == expected
    assert decode.evaluation_spec(expected, preprocess) == expected
    ops, random = decode.build(expected)
    assert not random
    train, _ = decode.build(preprocess)
    for shape in ((40, 30, 3), (9, 70, 3), (8, 6, 3)):
        image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        assert ops(image, 0, 0).shape == train(image, 1, 2).shape
        np.testing.assert_array_equal(ops(image, 0, 0), ops(image, 1, 2))


NOISE = np.random.default_rng(0).integers(0, 256, (137, 211, 3), np.uint8)


def own_crops(n, h, w, **settings):
    """(top, left, height, width) of each crop, read without resizing from an image that encodes rows and columns."""
    boxes = []
    for i in range(n):
        generator = rngs.generator(3, "crop", i)
        box = None
        while box is None:
            box = resizing._crop(generator, h, w, settings["area"], generator.uniform(*settings["ratio"]))
        boxes.append(box)
    return np.array(boxes)


def tensorflows_crops(n, h, w, area, ratio):
    sample = tf.function(
        lambda i: tf.image.stateless_sample_distorted_bounding_box(
            (h, w, 3), tf.zeros((0, 0, 4)), tf.stack([i, 5]), area_range=area, aspect_ratio_range=ratio,
            min_object_covered=0, use_image_if_no_bounding_boxes=True,
        )[:2]
    )  # fmt: skip
    begin, size = tf.map_fn(sample, tf.range(n), fn_output_signature=(tf.int32, tf.int32))
    return np.concatenate([begin[:, :2], size[:, :2]], 1)


@pytest.mark.parametrize(
    ("h", "w", "area", "ratio"),
    [
        (60, 41, (0.3, 0.5), (0.5, 2.0)),
        *thorough((375, 500, (0.05, 1.0), (0.75, 1.33)), (9, 50, (0.05, 1.0), (0.75, 1.33))),
    ],
)
def test_crops_are_distributed_as_tensorflows(h, w, area, ratio):
    """Two-sample tests of height, width, position, area and ratio."""
    n = 2_000
    own, theirs = own_crops(n, h, w, area=area, ratio=ratio), tensorflows_crops(n, h, w, area, ratio)
    for a, b in zip(own.T, theirs.T, strict=True):
        assert stats.ks_2samp(a, b).pvalue > 1e-3
    for combine in (np.multiply, np.divide):
        assert stats.ks_2samp(combine(*own[:, :1:-1].T), combine(*theirs[:, :1:-1].T)).pvalue > 1e-3
    assert (own[:, :2] >= 0).all()
    assert (own[:, :2] + own[:, 2:] <= (h, w)).all()


@pytest.mark.parametrize("method", ["bilinear", "area"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sizes_are_tensorflows(method, channels):
    """Except for values so close to a whole number that float32 cannot distinguish them."""
    near = 0.01 if method == "area" else 2e-3
    for image in (load_sample_image("china.jpg"), NOISE, NOISE[:40, :60]):
        image = np.concatenate([image, image[::-1, :, :1]], 2)[..., :channels]
        for size in ((224, 224), (64, 80), (341, 256)):
            theirs = tf.image.resize(image, size, method=method, antialias=False).numpy()
            difference = getattr(resizing, method)(image, *size).astype(int) - np.clip(theirs, 0, 255).astype(np.uint8)
            assert set(np.unique(difference)) <= {-1, 0, 1}
            assert np.abs(theirs - np.rint(theirs))[difference != 0].max(initial=0) < near

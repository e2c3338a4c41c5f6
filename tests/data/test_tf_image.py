"""Crops and sizes of `tf.image`, against TensorFlow itself."""

import numpy as np
import pytest
import tensorflow as tf
from cases import thorough
from scipy import stats
from sklearn.datasets import load_sample_image

from imgclf_jax.core import rng as rngs
from imgclf_jax.data import resizing

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

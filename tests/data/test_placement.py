"""Batches on the devices are the stream's, with either placement."""

import jax
import numpy as np
import pytest
from test_batches import fake

from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import placement, sources, stream

pytestmark = pytest.mark.optimized


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        jax.tree.map(np.testing.assert_array_equal, x, y)


SPEC = stream.StreamSpec(5, 24)


@pytest.mark.parametrize("place", ["host", "device"])
def test_the_batch_of_a_step(place):
    """With either placement, from any first step, sharded along its examples."""
    mesh, images = sharding.make_mesh(), stream.Images(fake(), "decode(1)|resize(7)", 5)
    expected = list(stream.train_batches(images, 5, 24, 3, 11))
    steps, found = zip(*placement.batches(place, images, SPEC, range(3, 11), mesh), strict=True)
    assert steps == (*range(3, 11),)
    assert_same(found, expected)
    assert_same([batch for _, batch in placement.batches(place, images, SPEC, range(6, 11), mesh)], expected[3:])
    shapes = placement.batch_shape(24, images.shape, 0, mesh)
    for batch in found:
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), batch) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), shapes
        )
    assert len(found[0]["image"].addressable_shards) == 8


def test_device_placement_refuses_random_host_ops():
    images = stream.Images(fake(), "decode(1)|random_resized_crop(6, 5)")
    with pytest.raises(UserError, match=r"is random; use data.placement='host', or move the randomness to augment"):
        next(placement.batches("device", images, stream.StreamSpec(0, 8), [0], sharding.make_mesh()))


def test_device_placement_refuses_what_does_not_fit():
    images = stream.Images(sources.fake(2**30, (256, 256, 3))["train"], "decode(3)")
    with pytest.raises(UserError, match=r"^data\.placement='device': 1,073,741,824 decoded images needs 211 TB"):
        next(placement.batches("device", images, SPEC, [0], sharding.make_mesh()))

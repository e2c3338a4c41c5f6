"""Chunks on the device hold the stream's batches, and training does not depend on the chunk size."""

import jax
import numpy as np
import pytest
from test_batches import fake

from imgclf_jax.core import platform, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import placement, sources, stream

pytestmark = pytest.mark.optimized


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        jax.tree.map(np.testing.assert_array_equal, x, y)


RANGES = [range(3, 7), range(7, 8), range(8, 11)]
SPEC = stream.StreamSpec(5, 24)


def chunks(place, images, mesh, size=4):
    return placement.train_chunks(place, images, SPEC, RANGES, size, mesh)


@pytest.mark.parametrize(
    ("place", "devices"), [("host", "cpu"), ("host", "tpu"), ("device", "cpu"), ("device", "gpu"), ("device", "tpu")]
)
def test_chunks_hold_the_batches_of_their_steps(monkeypatch, place, devices):
    """With either placement, for any range that contains the step, and sharded along the batch."""
    monkeypatch.setattr(platform, "platform_of", lambda mesh: devices)
    mesh, images = sharding.make_mesh(), stream.Images(fake(), "decode(1)|resize(7)", 5)
    expected = list(stream.train_batches(images, 5, 24, 3, 11))
    at = jax.jit(lambda chunk, i: placement.batch_at(chunk, i, images.shape))
    found = []
    for expected_steps, (steps, chunk) in zip(RANGES, chunks(place, images, mesh), strict=True):
        assert steps == expected_steps
        found += [at(chunk, i) for i in range(len(steps))]
    assert_same(found, expected)
    shapes = placement.chunk_shape(place, len(images), images.shape, SPEC, 4, mesh)
    for _, chunk in chunks(place, images, mesh):
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), chunk) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), shapes
        )
    _, split = next(chunks(place, images, mesh))
    if place == "device":
        assert split["table"]["image"].shape == (40, 8, 128) if devices == "tpu" else (40, *images.shape)
    assert len(split["id" if place == "device" else "image"].addressable_shards) == 8


def test_device_placement_refuses_random_host_ops():
    images = stream.Images(fake(), "decode(1)|random_resized_crop(6, 5)")
    with pytest.raises(UserError, match=r"is random; use data.placement='host', or move the randomness to augment"):
        next(placement.train_chunks("device", images, stream.StreamSpec(0, 8), [range(1)], 1, sharding.make_mesh()))


def test_device_placement_refuses_what_does_not_fit():
    """More examples than 32 bits can number, before the program is traced; and more bytes than the machine has."""
    mesh = sharding.make_mesh()
    with pytest.raises(UserError, match=r"^data\.placement='device' numbers examples in 32 bits, but there are 2,147"):
        placement.chunk_shape("device", 2**31, (7, 7, 1), SPEC, 4, mesh)
    images = stream.Images(sources.fake(2**30, (256, 256, 3))["train"], "decode(3)")
    with pytest.raises(UserError, match=r"^data\.placement='device': 1,073,741,824 decoded images needs 211 TB"):
        next(chunks("device", images, mesh))

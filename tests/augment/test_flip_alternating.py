"""Two consecutive epochs show each example in both orientations: on either placement, at any batch size."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgclf_jax.augment import ops
from imgclf_jax.core import sharding
from imgclf_jax.data import placement, sampling, sources, stream

SEED, TEXT = 7, "flip_alternating|normalize"
APPLY = jax.jit(ops.build(TEXT, train=True))


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("batch_size", [8, 12])
def test_two_epochs_show_each_example_both_ways(place, batch_size):
    """Batches of 12 straddle the epochs of 40."""
    images = stream.Images(sources.fake(40, (6, 8, 1), 4)["train"], "decode(1)", SEED)
    everything = images.read(np.arange(40), np.arange(40))["image"]
    spec, mesh = stream.StreamSpec(SEED, batch_size, needs_ids=True), sharding.make_mesh(jax.devices()[:1])
    flips = {}
    for step, batch in placement.batches(place, images, spec, range(-(-4 * 40 // batch_size)), mesh):
        out = np.asarray(APPLY(None, batch["image"], jnp.uint32(SEED), batch["id"], batch["epoch"])) * 255
        ids = sampling.example_ids(SEED, step, batch_size, 40)
        np.testing.assert_array_equal(batch["id"], ids)
        for position, own, id_ in zip(itertools.count(step * batch_size), np.round(out), ids, strict=False):
            same, mirrored = (own == everything[id_]).all(), (own == everything[id_][:, ::-1]).all()
            assert same != mirrored
            flips[position // 40, id_] = mirrored
    for epoch in range(3):
        for id_ in range(40):
            assert flips[epoch, id_] != flips[epoch + 1, id_]
    first = [flips[0, id_] for id_ in range(40)]
    assert 0 < sum(first) < 40

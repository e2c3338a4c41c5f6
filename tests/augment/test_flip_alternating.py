"""Two consecutive epochs show each example in both orientations: on either placement, at any batch size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgclf_jax.augment import ops
from imgclf_jax.core import sharding
from imgclf_jax.data import placement, sampling, sources, stream

SEED, TEXT = 7, "flip_alternating|normalize"
APPLY = jax.jit(ops.build(TEXT, train=True))


def images():
    return stream.Images(sources.fake(40, (6, 8, 1), 4)["train"], "decode(1)", SEED)


def orientations(place, batch_size, start, stop):
    """[(epoch, id, flipped)] of each position from step start to stop, read from the pixels."""
    opened, mesh = images(), sharding.make_mesh(jax.devices()[:1])
    everything = opened.read(np.arange(40), np.arange(40))["image"]
    spec = stream.StreamSpec(SEED, batch_size, needs_ids=True)
    seen = []
    for step, batch in placement.batches(place, opened, spec, range(start, stop), mesh):
        out = np.asarray(APPLY(None, batch["image"], jnp.uint32(SEED), batch["id"], batch["epoch"])) * 255
        ids = sampling.example_ids(SEED, step, batch_size, 40)
        np.testing.assert_array_equal(batch["id"], ids)
        for place_, (own, id_) in enumerate(zip(np.round(out), ids, strict=True)):
            same, mirrored = (own == everything[id_]).all(), (own == everything[id_][:, ::-1]).all()
            assert same != mirrored
            seen.append(((step * batch_size + place_) // 40, int(id_), bool(mirrored)))
    return seen


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("batch_size", [8, 12])
def test_two_epochs_show_each_example_both_ways(place, batch_size):
    """Batches of 12 straddle the epochs of 40."""
    stop = -(-4 * 40 // batch_size)
    flips = {(epoch, id_): flipped for epoch, id_, flipped in orientations(place, batch_size, 0, stop)}
    for epoch in range(3):
        for id_ in range(40):
            assert flips[epoch, id_] != flips[epoch + 1, id_]
    first = [flips[0, id_] for id_ in range(40)]
    assert 0 < sum(first) < 40

"""Two consecutive epochs show each example in both orientations: on either placement, resumed, at any batch size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import outcome

from imgclf_jax.augment import ops
from imgclf_jax.core import sharding
from imgclf_jax.data import placement, sampling, sources, stream
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import command as train

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
    stop = 4 * 40 // batch_size
    flips = {(epoch, id_): flipped for epoch, id_, flipped in orientations(place, batch_size, 0, stop)}
    for epoch in range(2):
        for id_ in range(40):
            assert flips[epoch, id_] != flips[epoch + 1, id_]
            if (epoch + 2, id_) in flips:
                assert flips[epoch, id_] == flips[epoch + 2, id_]
    first = [flips[0, id_] for id_ in range(40)]
    assert 0 < sum(first) < 40


def test_placement_and_a_start_in_the_middle_change_nothing():
    whole = orientations("host", 12, 0, 12)
    assert orientations("device", 12, 0, 12) == whole
    assert orientations("host", 12, 5, 12) == whole[5 * 12 :]


@pytest.mark.thorough
def test_batches_carry_ids_only_where_an_op_asks(tmp_path, fake_config):
    """A run with such an op trains to the same bits on either placement."""
    assert [ops.needs_ids(t) for t in ("", "flip_lr|normalize", TEXT)] == [False, False, True]
    mesh = sharding.make_mesh()
    for place in ("host", "device"):
        plain, needs_ids = stream.StreamSpec(SEED, 8), stream.StreamSpec(SEED, 8, needs_ids=True)
        _, plain = next(placement.batches(place, images(), plain, [0], mesh))
        assert set(plain) == {"image", "label"}
        _, asked = next(placement.batches(place, images(), needs_ids, [0], mesh))
        shapes = placement.batch_shape(8, (6, 8, 1), 0, mesh, id="int32", epoch="int32")
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), asked) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), shapes
        )
    found = set()
    for i, place in enumerate(("host", "device")):
        fake_config.augment, fake_config.data.placement = TEXT, place
        assert train.main(fake_config, Workdir(tmp_path / str(i))) == 0
        found.add(outcome(tmp_path / str(i))[0])
    assert len(found) == 1
    fake_config.augment = "normalize"
    assert train.main(fake_config, Workdir(tmp_path / "plain")) == 0
    assert outcome(tmp_path / "plain")[0] not in found

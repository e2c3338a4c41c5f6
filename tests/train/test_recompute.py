"""Silent data corruption: a step that is computed twice finds it, names the devices, and raises no false alarm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough

from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train import command as train
from imgclf_jax.train import recompute


def flip(x, bit, place, device=None):
    """The array with one bit flipped: `bit` of the element `place` of the part on a device, or on all that hold it."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.device.id)
    target = shards[device or 0]

    def of(shard):
        data = np.array(shard.data)
        if shard.device == target.device or (device is None and shard.index == target.index):
            flat = data.reshape(-1).view(np.uint8)
            flat[place % flat.size] ^= 1 << bit % 8
        return jax.device_put(data, shard.device)

    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, [of(shard) for shard in x.addressable_shards])


@pytest.fixture(scope="module")
def state():
    """Arrays of several dtypes, replicated and sharded over eight devices."""
    mesh = sharding.make_mesh(text="data=2, fsdp=4")
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    return {
        "kernel": jax.device_put(jax.random.normal(jax.random.key(0), (6, 8)), split),
        "moment": sharding.put_replicated(np.asarray(jnp.linspace(-1, 1, 5, dtype=jnp.bfloat16)), mesh),
        "count": sharding.put_replicated(np.int32(3), mesh),
        "key": jax.device_put(jax.random.key(1), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())),
        "empty": sharding.put_replicated(np.zeros((0, 3), np.float32), mesh),
    }


def test_every_flipped_bit_is_found_with_its_device(state):
    """Single bits drawn by seed: in both results and in one of them, in one replica and in all."""
    rng = np.random.default_rng(0)
    assert recompute.find_differences(state, state) == ([], [])
    for _ in range(60):
        name = ("kernel", "moment", "count")[rng.integers(3)]
        device = int(rng.integers(8))
        wrong = {**state, name: flip(state[name], int(rng.integers(8)), int(rng.integers(100)), device)}
        assert recompute.find_differences(wrong, state)[0] == [name]
        assert device in recompute.find_differences(wrong, state)[1]
        assert recompute.find_differences(wrong, wrong)[0] == [name]  # replicas that differ, computed twice alike
        everywhere = {**state, name: flip(state[name], 3, 1)}
        assert recompute.find_differences(state, everywhere)[0] == [name]
    with pytest.raises(UserError, match=r"step 7 gives other bits .*, in count, on device 0, 1.* from the beginning"):
        recompute.refuse_difference(7, state, {**state, "count": flip(state["count"], 3, 1)}, lambda: "the beginning")


@pytest.mark.parametrize("mesh", thorough("data=2, fsdp=4", "data=-1"))
def test_a_healthy_run_raises_no_alarm_and_keeps_its_bits(mesh, fake_config, tmp_path):
    fake_config.mesh, fake_config.total, fake_config.model = mesh, "6 steps", "mlp(widths=(8,), dropout=0.1)"
    assert train.main(fake_config, Workdir(tmp_path / "a")) == 0
    fake_config.check_every = "2 steps"
    assert train.main(fake_config, Workdir(tmp_path / "b")) == 0
    a, b = (read_metrics(tmp_path / name / "digests.jsonl")[-1] for name in "ab")
    assert a == b


def test_a_run_ends_at_a_step_that_gives_other_bits(fake_config, tmp_path, monkeypatch, one_device):
    """It names the step, keeps its checkpoint, and continues from it."""
    fake_config.total, fake_config.checkpoint_every, fake_config.check_every = "6 steps", "2 steps", "4 steps"
    copy = jnp.copy
    with monkeypatch.context() as patch:
        patch.setattr(jnp, "copy", lambda x: flip(copy(x), 1, 0) if x.dtype == jnp.float32 else copy(x))
        with pytest.raises(UserError, match=r"step 3 gives other bits .* continues from the checkpoint of step 2"):
            train.main(fake_config, Workdir(tmp_path))
    assert train.main(fake_config, Workdir(tmp_path)) == 0

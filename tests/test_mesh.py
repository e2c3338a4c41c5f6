"""`mesh` and `shard`: a sharded run is the run whose state is replicated."""

import math

import cases
import jax
import numpy as np
import pytest
from cases import rewind
from jax.sharding import AxisType
from PIL import Image

import launch
from imgclf_jax.core import sharding, tree
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.trained import load


def programs(mesh="data=-1", devices=None, **keys):
    usual = {"model": "mlp(widths=(256, 128))", "batch_size": 32, "total": "100 steps", "preprocess": "decode(3)",
             "augment": "flip_lr|normalize(0.5, 0.25)", "schedule": "constant(1e-3)"}  # fmt: skip
    return cases.programs((8, 8, 3), 4, devices, **{**usual, "mesh": mesh, **keys})


def train(of, steps):
    """The run after some steps, and the mean loss of each; all runs see the same batches."""
    rng = np.random.default_rng(0)
    state, losses = of.init_state(), []
    for _ in range(steps):
        images = rng.integers(0, 256, (of.stream.rows, 8, 8, 3), np.uint8)
        labels = rng.integers(0, 4, of.stream.rows, np.int32)
        batch = sharding.put_batch({"image": images, "label": labels}, of.mesh)
        state, window = of.train(state, of.zero_sums(), batch)
        losses.append(np.asarray(window["loss"]) / np.asarray(window["examples"]))
    return state, losses


# What a state consists of besides: averages of both kinds, several seeds, parts of the batch, batch statistics.
WAYS = {
    "adam": {"optimizer": "adam(eps=1e-3)"},  # with 1e-8, a gradient that is zero but for rounding moves a whole step
    "average": {"ema": 0.9, "optimizer": "lamb"},
    "lookahead": {"optimizer": "sgd(momentum=0.9)|lookahead(3, 0.5)"},
    "seeds": {"num_seeds": 2},
    "muon": {"optimizer": "muon"},
    "statistics": {"accumulate": 2, "model": "resnet_cifar(8)", "optimizer": "sgd(momentum=0.9)"},
}
SLOW = [pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way != "adam"]


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["adam", *SLOW])
def test_the_losses_are_those_of_data_parallel(way):
    """Over ten steps to 1e-6, over 100 to 1e-5; parameters and averages too, before rounding grows."""
    whole = programs(**WAYS[way])
    split = programs("data=2, fsdp=4", **WAYS[way])
    (a, losses), (b, others) = train(whole, 100), train(split, 100)
    np.testing.assert_allclose(losses[:10], others[:10], rtol=1e-6)
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(b.opt_state))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(b.params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), a.evaluated, b.evaluated)


@pytest.mark.thorough
def test_memory_of_each_device():
    """On four devices, parameters and Adam's state take at most 0.3 of the total, by the compiler's count too."""
    whole, split = programs(devices=4), programs("fsdp=-1", 4)

    def held(leaves):
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(leaves))

    one, all_of_it = (held((of.shape["state"].params, of.shape["state"].opt_state)) for of in (split, whole))
    assert one <= 0.3 * all_of_it
    compiled = [of.traced_train.lower().compile() for of in (whole, split)]
    arguments = [program.memory_analysis().argument_size_in_bytes for program in compiled]
    batch = held(whole.batch_shape)
    assert arguments[1] - batch <= 0.32 * (arguments[0] - batch)


def test_rules_choose_the_axis():
    of = programs("fsdp=-1", **{"rules.shard": "backbone/dense0/kernel=0, head/.*=none, .*/bias=0"})
    specs = {name: tuple(x.sharding.spec) for name, x in tree.named_leaves(of.shape["state"])}
    assert specs["params/backbone/dense0/kernel"] == ("fsdp",)
    assert specs["params/backbone/dense1/kernel"] == ("fsdp",)  # the largest of (256, 128)
    assert specs["params/backbone/dense0/bias"] == ("fsdp",)
    assert specs["params/head/kernel"] == ()
    moments = [spec for name, spec in specs.items() if name.endswith("mu/backbone/dense0/kernel")]
    assert moments == [("fsdp",)]


@pytest.mark.thorough
def test_a_checkpoint_goes_from_one_arrangement_to_another(tmp_path):
    """Bit for bit, both ways, of two seeds."""
    whole, split = programs(num_seeds=2), programs("data=2, fsdp=4", num_seeds=2)
    state, _ = train(split, 3)
    checkpoints = Checkpoints(tmp_path / "a")
    checkpoints.save(3, {"state": state, "sums": split.zero_sums()})
    checkpoints.wait()
    there = checkpoints.restore(3, whole.shape)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(there["state"]))
    other = Checkpoints(tmp_path / "b")
    other.save(3, there)
    other.wait()
    back = other.restore(3, split.shape)
    assert tree.sha256(jax.device_get(back["state"])) == tree.sha256(jax.device_get(state))
    assert jax.tree.map(lambda x: x.sharding.spec, back["state"]) == jax.tree.map(lambda x: x.sharding.spec, state)


@pytest.mark.thorough
def test_a_run_trains_resumes_and_predicts(tmp_path, capsys):
    """On another mesh than it began with. Parameters stay sharded, and no command loads the optimizer."""
    arguments = [f"--workdir={tmp_path / 'run'}", "--config.data.source=fake(64, (8, 8, 3), 4)",
                 "--config.model=mlp(widths=(256,))", "--config.schedule=constant(1e-3)", "--config.batch_size=16",
                 "--config.eval_every=", "--config.augment="]  # fmt: skip
    run, total = tmp_path / "run", ["--config.total=8 steps", "--config.checkpoint_every=4 steps"]
    assert launch.main([*arguments, *total, "--config.mesh=data=2, fsdp=4"]) == 0
    rewind(run, 4)
    assert launch.main([*arguments, *total, "--config.mesh=fsdp=-1"]) == 0
    model = load(run)
    kernel = model.state.params["backbone"]["dense0"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    assert model.state.opt_state is None
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    capsys.readouterr()
    for command in (["evaluate"], ["predict", str(tmp_path / "a.png")]):  # others: test_processes
        assert launch.main([*command, f"--workdir={run}"]) == 0, command
    assert "test: examples " in capsys.readouterr().out
    fine = [*arguments[1:], "--config.mesh=data=-1", f"--config.init_from={tmp_path / 'run'}"]
    assert launch.main([f"--workdir={tmp_path / 'next'}", *fine, "--config.total=2 steps"]) == 0


def test_the_mesh_is_that_of_jax():
    for text, shape in (("data=-1", (8,)), ("data=2, fsdp=4", (2, 4)), ("fsdp=4,data=-1", (4, 2))):
        mesh = sharding.make_mesh(text=text)
        expected = jax.make_mesh(shape, mesh.axis_names, axis_types=(AxisType.Auto,) * len(shape))
        assert mesh == expected
        assert np.array_equal(mesh.devices.ravel(), jax.devices())

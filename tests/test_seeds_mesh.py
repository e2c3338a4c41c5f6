"""The mesh's axis `seeds`: device groups that train different seeds equal devices that each train all seeds."""

import itertools
import json

import jax
import numpy as np
import pytest
from cases import thorough
from test_mesh import DATA, config, programs, train  # noqa: F401  `config` is a fixture

import launch
from imgclf_jax.core import jaxprs, platform, sharding
from imgclf_jax.tools.dryrun import counts

MESHES = ["seeds=4, data=-1", "data=4, seeds=2"]  # of four seeds: one in each group, and two
WAYS = {
    "adam": {},
    "average": {"ema": 0.9, "optimizer": "lamb"},
    "statistics": {"accumulate": 2, "model": "smooth_net:Smooth", "optimizer": "sgd(momentum=0.9)"},
}


def batch(of):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (of.eval_batch_size, *DATA.image_shape), np.uint8)
    labels = rng.integers(0, 4, of.eval_batch_size, np.int32)
    return {"image": images, "label": labels, "mask": np.arange(of.eval_batch_size) % 3 > 0}


@pytest.mark.parametrize(("way", "mesh"), thorough(*itertools.product(WAYS, MESHES)))
def test_training_and_evaluation_are_those_of_all_seeds_on_each_device(config, way, mesh):  # noqa: F811
    """The losses of each seed over 20 steps, to 1e-5, and the parameters before rounding grows."""
    keys = {"num_seeds": 4} | WAYS[way]
    whole, split = programs(config, **keys), programs(config, mesh, **keys)
    (a, losses), (b, others) = train(whole, 20), train(split, 20)
    assert np.shape(losses) == (20, 4)
    assert len(np.unique(losses[0])) == 4  # each seed has losses of its own
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), a.evaluated, b.evaluated)
    sums = [
        jax.device_get(of.eval(*state.evaluated, sharding.put_batch(batch(split), of.mesh))[0])
        for of, state in ((whole, b_on(whole, b)), (split, b))
    ]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), *sums)


def b_on(of, state):
    """The state where the programs of another mesh expect it."""
    return jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s.sharding), state, of.shape["state"])


@pytest.mark.thorough
def test_what_a_device_holds_and_sends(config):  # noqa: F811
    """A device holds the state of its seeds and exchanges none of it; only images are sent to it."""
    keys = {"num_seeds": 8}
    whole, split = programs(config, **keys), programs(config, "seeds=8", **keys)
    held = [counts.bytes_per_device(of.shape["state"]) for of in (whole, split)]
    assert held[1] * 8 == held[0]
    sent = counts.count_program(split.train).collectives
    assert "all-reduce" not in sent
    images = split.stream.rows * np.prod(DATA.image_shape)
    assert sum(size for _, size in sent.values()) < 1.2 * images


@pytest.mark.thorough
@pytest.mark.parametrize("devices", ["gpu", *thorough("tpu")])
def test_a_seed_of_its_own_devices_has_the_convolutions_of_a_single_run(config, monkeypatch, devices):  # noqa: F811
    """Several seeds in one program have grouped convolutions. Both have the same operations."""
    operations = []
    monkeypatch.setattr(platform, "platform_of", lambda mesh: devices)

    def groups(mesh):
        of = programs(config, mesh, model="resnet_cifar(8)", num_seeds=8)
        operations.append(jaxprs.matmul_flops(of.traced_train.jaxpr))
        found, todo = [], [of.traced_train.jaxpr]
        while todo:
            jaxpr = todo.pop()
            for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
                todo += jaxprs.inner(equation)
                if equation.primitive.name == "conv_general_dilated":
                    found.append(equation.params["feature_group_count"] * equation.params["batch_group_count"])
        return found

    assert max(groups("data=-1")) == 8
    assert set(groups("seeds=8")) == {1}
    assert operations[0] == pytest.approx(operations[1], rel=1e-3)


@pytest.mark.thorough
def test_a_run_trains_resumes_and_predicts(tmp_path):
    """On another mesh than it began with: its results equal those of a run on one mesh up to rounding."""
    arguments = ["--config.data.source=fake(64, (8, 8, 3), 4)", "--config.model=mlp(widths=(32,))",
                 "--config.schedule=constant(1e-3)", "--config.augment=flip_alternating|normalize",
                 "--config.batch_size=16", "--config.num_seeds=4"]  # fmt: skip

    def run(name, mesh, steps, *flags):
        words = [f"--workdir={tmp_path / name}", f"--config.mesh={mesh}", f"--config.total={steps} steps"]
        assert launch.main([*arguments, *words, *flags]) == 0
        return json.loads((tmp_path / name / "result.json").read_text())

    run("a", "seeds=4, data=2", 4)
    found = run("a", "seeds=2, data=4", 8, "--extend")
    expected = run("b", "data=-1", 8)
    for name, value in expected["test"].items():
        assert found["test"][name] == pytest.approx(value, rel=1e-4), name
    assert launch.main(["evaluate", f"--workdir={tmp_path / 'a'}"]) == 0
    next_run = [f"--config.init_from={tmp_path / 'a'}", "--config.mesh=seeds=4, data=-1", "--config.total=2 steps"]
    assert launch.main([*arguments, f"--workdir={tmp_path / 'c'}", *next_run]) == 0

"""A run's bits follow from config and seed: not from cadences, placement, or where it was resumed."""

import json
from dataclasses import replace

import digests
import pytest
from digests import Way
from flax import linen as nn
from resume_check import outcome

import launch
from imgclf_jax import config as configs
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train import command as train

pytestmark = pytest.mark.optimized


@pytest.mark.thorough
def test_a_network_with_batch_statistics(tmp_path):
    """A small network, in bfloat16."""
    ways = [Way("1 steps"), Way("5 steps"), Way("", "device")]
    model, resumed = "airbench(widths=(4,))", [(ways[0], Way("1 steps", "device"))]
    found = digests.train_in_ways(tmp_path, "airbench", "bfloat16", ways, resumed, model=model)
    assert len({digest for _, digest in found}) == 1, found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", digests.NETWORKS)
def test_every_way_to_train(network, precision, tmp_path):
    found = digests.train_in_ways(tmp_path, network, precision, digests.WAYS, digests.RESUMED)
    assert len({digest for _, digest in found}) == 1, found


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"num_seeds": 2}, {"accumulate": 2, "mix": "mixup(0.2)"}])
def test_every_way_to_train_with(more, tmp_path):
    found = digests.train_in_ways(tmp_path, "resnet_cifar", "float32", digests.WAYS, digests.RESUMED, **more)
    assert len({digest for _, digest in found}) == 1, found


@pytest.mark.usefixtures("one_device")
def test_training_depends_on_neither_placement_nor_threads(fake_config, tmp_path):
    """The same parameters, metrics and evaluations."""
    config = fake_config
    config.model = "mlp(widths=(8,))"
    config.total, config.augment = "23 steps", "flip_lr|normalize"
    config.log_every, config.eval_every, config.checkpoint_every = "5 steps", "7 steps", "11 steps"
    results = []
    for config.data.placement, config.data.threads in (("host", 1), ("device", 3)):
        workdir = Workdir(tmp_path / config.data.placement)
        assert train.main(config, workdir) == 0
        results.append((*outcome(workdir.path), json.loads(workdir.result.read_text())["test"]))
    assert results[0] == results[1]
    assert [r["step"] for r in results[0][1] if "train/loss" in r] == [5, 10, 15, 20, 23]


DATA = DataInfo(64, (12, 12, 1), ("a", "b"), "")


def of(config, mesh=None, **keys):
    """The programs of a run of a thousand steps with these config keys."""
    config.update({"total": "1000 steps", "log_every": "9 steps", "eval_every": "", "checkpoint_every": "", **keys})
    recipe = Recipe(config, DATA)
    return Programs(recipe, mesh) if mesh else Programs(recipe)


class Counting(nn.Module):
    """Counts how often it is traced for training."""

    @nn.compact
    def __call__(self, x, train=False):
        traced.append(train)
        return x.reshape(x.shape[0], -1)


traced = []


def test_the_train_step_is_traced_once(fake_config):
    """For the shapes of its sums and for the program."""
    traced.clear()
    _ = of(fake_config, model=f"{__name__}:Counting").traced_train
    assert traced.count(True) == 1


@pytest.mark.thorough
def test_keys_that_may_differ_on_resume_change_no_bit(fake_config, tmp_path):
    """All FREE_KEYS at once: the digest is that of a run that never had them; the record has them and reproduces."""
    whole, moved = Workdir(tmp_path / "whole"), Workdir(tmp_path / "moved")
    assert train.main(fake_config, whole) == 0
    train.main(fake_config, moved, transform_run=lambda run: replace(run, cadences=replace(run.cadences, end=4)))
    other = fake_config.copy_and_resolve_references()
    new = {"log_every": "3 steps", "eval_every": "5 steps", "checkpoint_every": "7 steps", "checkpoint.keep": 1,
           "checkpoint.best": "test/auc", "metrics": "auc", "check_every": "5 steps"}  # fmt: skip
    assert set(new) == set(configs.FREE_KEYS)
    other.update_from_flattened_dict(new)
    assert train.main(other, moved) == 0
    found = {json.loads(place.result.read_text())["params_sha256"] for place in (whole, moved)}
    assert len(found) == 1
    assert configs.flatten(moved.load_config()).items() >= new.items()
    began, resumed = moved.read_snapshots()
    assert [(one["step"], one["keys"]["checkpoint.keep"]) for one in (began, resumed)] == [(0, 2), (4, 1)]
    steps = [record["step"] for record in read_metrics(moved.metrics) if "test/accuracy" in record]
    assert steps == [5, 10, 12]
    assert launch.main(["reproduce", str(moved.path), f"--output={tmp_path}/again"]) == 0
    before = moved.config.read_bytes()
    assert train.main(fake_config, moved) == 0  # the run is done
    assert moved.config.read_bytes() == before

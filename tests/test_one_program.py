"""A run's bits follow from config and seed: not from cadences, chunks, placement, or where it was resumed."""

import json
import logging
import re
from dataclasses import replace

import digests
import jax
import jax.numpy as jnp
import pytest
from digests import Way
from flax import linen as nn
from resume_check import outcome
from test_programs import ELSEWHERE, described_mesh

import launch
from imgclf_jax import config as configs
from imgclf_jax.core import platform
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train import loop as train

pytestmark = pytest.mark.optimized


@pytest.mark.thorough
def test_a_network_with_batch_statistics(tmp_path):
    """A small network, in bfloat16; a call of one step used to be another program, with other bits."""
    ways = [Way("1 steps", 1), Way("5 steps", 3), Way("", 0, "device")]
    model, resumed = "airbench(widths=(4,))", [(ways[0], Way("1 steps", 3))]
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
def test_training_does_not_depend_on_the_steps_in_a_call(fake_config, tmp_path):
    """One step a call on images of the host, or many on images of the device, and any number of threads.

    Ending wherever something is due: the same parameters, metrics and evaluations.
    """
    config = fake_config
    config.model = "mlp(widths=(8,))"
    config.total, config.augment = "23 steps", "flip_lr|normalize"
    config.log_every, config.eval_every, config.checkpoint_every = "5 steps", "7 steps", "11 steps"
    results = []
    for size, config.data.placement, config.data.threads in ((1, "host", 1), (32, "device", 3)):
        config.steps_per_call = size
        workdir = Workdir(tmp_path / str(size))
        assert train.main(config, workdir) == 0
        results.append((*outcome(workdir.path), json.loads(workdir.result.read_text())["test"]))
    assert results[0] == results[1]
    assert [r["step"] for r in results[0][1] if "train/loss" in r] == [5, 10, 15, 20, 23]


DATA = DataInfo(64, (12, 12, 1), ("a", "b"), "")


class Plain(nn.Module):
    """A user's own network, with Flax's convolution."""

    @nn.compact
    def __call__(self, x, train=False):
        return jnp.mean(nn.Conv(4, (3, 3))(x), (1, 2))


class InTraining(nn.Module):
    """A network that convolves only in training."""

    @nn.compact
    def __call__(self, x, train=False):
        return jnp.mean(blur(x) if train else x, (1, 2))


def blur(images):
    """A device op that convolves in a loop of its own."""
    kernel = jnp.ones((3, 3, 1, 1), jnp.float32) / 9
    return jax.lax.fori_loop(0, 2, lambda _, x: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), images.astype(jnp.float32))  # fmt: skip


def convolving_loss(logits, labels):
    return jnp.sum(blur(logits[:, :, None, None]), (1, 2, 3)) * labels.astype(logits.dtype)


def of(config, mesh=None, **keys):
    """The programs of a run of a thousand steps with these config keys."""
    config.update({"total": "1000 steps", "log_every": "9 steps", "eval_every": "", "checkpoint_every": "", **keys})
    recipe = Recipe(config, DATA)
    return Programs(recipe, mesh) if mesh else Programs(recipe)


@pytest.mark.parametrize(("keys", "expected"), [
    ({"model": "cnn(widths=(4,))"}, 32),
    ({"model": "cnn(widths=(4,))", "steps_per_call": 7}, 7),
    ({"model": "mlp", "steps_per_call": 40}, 40),
    ({"model": f"{__name__}:Plain"}, 1),
    ({"model": "resnet_cifar(8)"}, 1 if platform.has_onednn() else 32),
    ({"model": f"{__name__}:InTraining"}, 1),
    ({"model": "mlp", "augment": f"{__name__}:blur"}, 1),
    ({"model": "mlp", "loss": f"{__name__}:convolving_loss"}, 1),
])  # fmt: skip
def test_steps_in_a_call(fake_config, keys, expected):
    """Many, whatever the cadences; one if a convolution of XLA or oneDNN, wherever it is, would be slow in a loop."""
    assert of(fake_config, **keys).steps_per_call == expected


def test_one_step_a_call_is_said_once(fake_config, caplog):
    with caplog.at_level(logging.INFO, "imgclf_jax"):
        programs = of(fake_config, model=f"{__name__}:Plain", steps_per_call=3)
        assert programs.steps_per_call == programs.steps_per_call == 1
        _ = programs.traced_train
        assert of(fake_config, model="mlp", steps_per_call=3).steps_per_call == 3
    [said] = caplog.messages
    assert re.fullmatch(
        r"steps_per_call=3 has no effect: a call runs one step, .* convolution is slow inside a loop on CPU", said
    )


def test_elsewhere_convolutions_are_fast_in_loops(fake_config):
    assert of(fake_config, described_mesh(*ELSEWHERE["gpu"]), model=f"{__name__}:Plain").steps_per_call == 32


def test_a_chunk_is_bounded_in_bytes(fake_config):
    """As long as two steps fit; of larger batches, a call trains one, without a loop."""
    for side, expected in ((64, 32), (128, 8), (224, 2), (256, 2), (300, 1)):
        recipe = Recipe(fake_config, DataInfo(64, (side, side, 4), ("a", "b"), ""))
        assert Programs(recipe).steps_per_call == min(expected, recipe.total)


class Counting(nn.Module):
    """Counts how often it is traced for training."""

    @nn.compact
    def __call__(self, x, train=False):
        traced.append(train)
        return x.reshape(x.shape[0], -1)


traced = []


def test_the_train_step_is_traced_once(fake_config):
    """Although its operations are inspected before the program is built from it."""
    traced.clear()
    _ = of(fake_config, model=f"{__name__}:Counting").traced_train
    assert traced.count(True) == 1


@pytest.mark.thorough
def test_keys_that_may_differ_on_resume_change_no_bit(fake_config, tmp_path):
    """All FREE_KEYS at once: the digest is that of a run that never had them; the record has them and reproduces."""
    whole, moved = Workdir(tmp_path / "whole"), Workdir(tmp_path / "moved")
    assert train.main(fake_config, whole) == 0
    train.main(fake_config, moved, adjusted=lambda run: replace(run, cadences=replace(run.cadences, end=4)))
    other = fake_config.copy_and_resolve_references()
    new = {"log_every": "3 steps", "eval_every": "5 steps", "checkpoint_every": "7 steps", "checkpoint.keep": 1,
           "checkpoint.best": "test/auc", "metrics": "auc", "check_every": "5 steps"}  # fmt: skip
    assert set(new) == set(configs.FREE_KEYS)
    other.update_from_flattened_dict(new)
    assert train.main(other, moved) == 0
    found = {json.loads(place.result.read_text())["params_sha256"] for place in (whole, moved)}
    assert len(found) == 1
    assert configs.flatten(moved.load_config()).items() >= new.items()
    (entry,) = json.loads(moved.provenance.read_text())["changed"]
    assert (entry["step"], entry["keys"]["checkpoint.keep"]) == (4, [2, 1])
    steps = [record["step"] for record in read_metrics(moved.metrics) if "test/accuracy" in record]
    assert steps == [5, 10, 12]
    assert launch.main(["reproduce", str(moved.path), f"--output={tmp_path}/again"]) == 0
    before = moved.config.read_bytes()
    assert train.main(fake_config, moved) == 0  # the run is done
    assert moved.config.read_bytes() == before

"""Chunks on the device are the stream's batches, and training on them does not depend on their size."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from imgclf_jax import config as configs
from imgclf_jax.commands import train
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import placement, sources, stream
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run import provenance
from imgclf_jax.run.workdir import Workdir


def fake():
    return sources.fake(40, (9, 8, 1), 5)["train"]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        jax.tree.map(np.testing.assert_array_equal, x, y)


RANGES = [(3, 7), (7, 8), (8, 11)]


def chunks(place, images, mesh, size=4):
    return placement.train_chunks(place, images, mesh, 5, 24, RANGES, size)


@pytest.mark.parametrize("place", ["host", "device"])
def test_chunks_hold_the_batches_of_their_steps(place):
    """On either placement, whatever the range a step is read in, and split over the devices along the batch."""
    mesh, images = sharding.make_mesh(), stream.Images(fake(), "decode(1)|resize(7)", 5)
    expected = list(stream.train_batches(images, 5, 24, 3, 11))
    at = jax.jit(placement.batch_at)
    found = []
    for (start, stop), chunk in zip(RANGES, chunks(place, images, mesh), strict=True):
        found += [at(chunk, i) for i in range(stop - start)]
    assert_same(found, expected)
    shapes = placement.chunk_shape(place, len(images), images.shape, mesh, 24, 4)
    for chunk in chunks(place, images, mesh):
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), chunk) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), shapes
        )
    split = next(iter(chunks(place, images, mesh)))
    assert len(split["id" if place == "device" else "image"].addressable_shards) == 8


def test_device_placement_refuses_random_host_ops():
    images = stream.Images(fake(), "decode(1)|random_resized_crop(6, 5)")
    with pytest.raises(
        UserError, match=r"draws at random; use data.placement='host', or move the randomness to augment"
    ):
        next(placement.train_chunks("device", images, sharding.make_mesh(), 0, 8, [(0, 1)], 1))


WITHOUT_TENSORFLOW = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "clu"):
    sys.modules[name] = None  # an import of it raises ImportError
from pathlib import Path
from imgclf_jax.commands import train
from imgclf_jax.config import default_config
from imgclf_jax.run.workdir import Workdir
config = default_config()
config.total, config.batch_size, config.data.placement = "2 steps", 8, "device"
config.data.source, config.preprocess, config.model = "fake(20, (8, 8, 1), 4)", "decode(1)", "mlp(widths=(4,))"
status = train.main(config, Workdir(Path(sys.argv[1])))
assert not any(sys.modules[n] for n in ("tensorflow", "tensorflow_datasets", "clu"))
sys.exit(status)
"""


def test_a_run_with_device_placement_needs_no_tensorflow(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TENSORFLOW, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"examples": 20' in (tmp_path / "result.json").read_text()


@pytest.mark.parametrize("place", ["host", "device"])
def test_training_does_not_depend_on_the_steps_in_a_call(place, fake_config, tmp_path):
    """One step a call or many, ending wherever something is due: the same parameters, metrics and evaluations."""
    config = fake_config
    config.model = "cnn(widths=(4,), hidden=8)"
    config.total, config.augment, config.log_every, config.eval_every = (
        "23 steps",
        "flip_lr|normalize",
        "5 steps",
        "7 steps",
    )
    config.data.placement, config.checkpoint_every = place, "11 steps"
    results = []
    for size in (1, 2, 4, 32):
        config.steps_per_call = size
        assert train.main(config, Workdir(tmp_path / str(size))) == 0
        result = json.loads((tmp_path / str(size) / "result.json").read_text())
        lines = (tmp_path / str(size) / "metrics.jsonl").read_text().splitlines()
        records = [
            {k: v for k, v in json.loads(line).items() if k not in ("train/images_per_second", "train/input_wait")}
            for line in lines
        ]
        results.append((result["params_sha256"], result["test"], records))
    assert all(result == results[0] for result in results[1:])
    assert [r["step"] for r in results[0][2] if "train/loss" in r] == [5, 10, 15, 20, 23]


@pytest.mark.parametrize("periods", [("5 steps", "7 steps", ""), ("0.3 epochs", "1 epochs", "40%"), ("", "", "")])
def test_ranges_cover_every_step_once_and_end_where_something_is_due(periods):
    periods = [configs.period(p, "log_every", 1437, 64, 90) for p in periods]
    for start in (0, 1, 13, 89):
        ranges = train._ranges(start, 90, 8, tuple(periods), (20, 27))
        assert [step for first, stop in ranges for step in range(first, stop)] == list(range(start, 90))
        assert all(1 <= stop - first <= 8 for first, stop in ranges)
        ends = {stop for _, stop in ranges}
        due = {s for s in range(start + 1, 91) for p in periods if configs.is_due(s, p)}
        assert due | {s for s in (20, 27, 90) if s > start} <= ends


def test_next_due_is_the_next_step_that_is_due():
    for text in ("1 steps", "3 steps", "0.37 epochs", "0.01 epochs", "33%"):
        every = configs.period(text, "log_every", 100, 10, 60)
        due = [step for step in range(1, 61) if configs.is_due(step, every)]
        for step in range(60):
            assert configs.next_due(step, every, 60) == next((d for d in due if d > step), 60)
    assert configs.next_due(5, None, 60) == 60


class Plain(nn.Module):
    """A user's own network, with Flax's convolution."""

    @nn.compact
    def __call__(self, x, train=False):
        return jnp.mean(nn.Conv(4, (3, 3))(x), (1, 2))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere convolutions are fast in loops")
@pytest.mark.parametrize(
    ("model", "steps", "expected"),
    [("cnn(widths=(4,))", 0, 32), (f"{__name__}:Plain", 0, 1), (f"{__name__}:Plain", 3, 3), ("mlp", 7, 7)],
)
def test_steps_per_call(fake_config, model, steps, expected):
    """Many by default, but one where XLA's own convolution would run inside of a loop on CPU, where it is very slow."""
    config = fake_config
    config.model, config.steps_per_call, config.total = model, steps, "1000 steps"
    config.log_every, config.eval_every, config.checkpoint_every = "200 steps", "", ""
    data = provenance.DataInfo(64, (12, 12, 1), ("a", "b"), "")
    assert Programs(Recipe(config, data)).steps_per_call == expected


def test_a_chunk_is_bounded_in_bytes_and_by_what_is_due(fake_config):
    config = fake_config
    config.total = "1000 steps"
    config.batch_size, config.log_every, config.eval_every, config.checkpoint_every = 64, "9 steps", "", ""
    mesh = sharding.make_mesh()
    assert Programs(Recipe(config, provenance.DataInfo(640, (12, 12, 1), ("a",), "")), mesh).steps_per_call == 9
    assert Programs(Recipe(config, provenance.DataInfo(640, (128, 128, 3), ("a",), "")), mesh).steps_per_call == 2

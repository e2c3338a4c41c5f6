"""The loop on fake data: it learns, meets mistakes before the first step, and is profiled."""

import gzip
import json

import pytest
from flax import linen as nn

from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train import command as train
from imgclf_jax.train import setup

pytestmark = pytest.mark.usefixtures("one_device")


def run(config, path):
    assert train.main(config, Workdir(path)) == 0
    return json.loads((path / "result.json").read_text())


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns(fake_config, tmp_path, precision):
    with fake_config.unlocked():
        fake_config.total = "80 steps"
        fake_config.schedule = "constant(1e-2)"
        fake_config.precision = precision
    assert run(fake_config, tmp_path)["test"]["accuracy"] > 0.9
    losses = [r["train/loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in r]
    assert losses[-1] < losses[0]


class Noisy(nn.Module):
    """Draws in evaluation, which has no random numbers."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(8)(x.reshape(len(x), -1)))


def test_what_only_evaluation_would_meet_is_met_before_the_first_step(fake_config, tmp_path):
    fake_config.model = f"{__name__}:Noisy"
    with pytest.raises(Exception, match='needs PRNG for "dropout"'):
        setup.set_up(fake_config, Workdir(tmp_path))


@pytest.mark.thorough
def test_profile_traces_the_steps_that_there_are(fake_config, tmp_path):
    """It writes a trace for Perfetto; steps beyond the run are not an error."""
    assert train.main(fake_config, Workdir(tmp_path / "a"), profile=(2, 4)) == 0
    [file] = (tmp_path / "a" / "profile").rglob("perfetto_trace.json.gz")
    names = [event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
    assert any("ThunkExecutor" in name for name in names)
    assert not [name for name in names if name.startswith("$")]  # Python's calls, such as "$threading.py:1 run"
    assert train.main(fake_config, Workdir(tmp_path / "b"), profile=(100, 110)) == 0
    assert not (tmp_path / "b" / "profile").exists()

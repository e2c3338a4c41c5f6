"""The loop on fake data: it learns, and starts quickly."""

import gzip
import json
import os
import signal
import time

import pytest
from flax import linen as nn

from imgclf_jax import step
from imgclf_jax.core.errors import UserError
from imgclf_jax.run import writers
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train import command as train
from imgclf_jax.train import loop, setup

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


def test_an_evaluation_that_fails_loses_no_step(fake_config, tmp_path, monkeypatch):
    """A run that evaluates and saves only at its end lost all of it to a damaged image or a lack of memory."""
    fake_config.eval_every = fake_config.checkpoint_every = ""

    def fail(*args):
        raise RuntimeError("out of memory")

    evaluate_all = loop.evaluate_all
    monkeypatch.setattr(loop, "evaluate_all", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(fake_config, tmp_path)
    monkeypatch.setattr(loop, "evaluate_all", evaluate_all)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["12"]
    assert "accuracy" in run(fake_config, tmp_path)["test"]


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


@pytest.mark.thorough
def test_a_run_of_billions_of_steps_begins_at_once(fake_config, tmp_path, monkeypatch):
    fake_config.total, fake_config.log_every = "2000000000 steps", "1 steps"

    def write(*args):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    sent = []
    monkeypatch.setattr(writers.MetricsWriter, "write_scalars", write)
    assert train.main(fake_config, Workdir(tmp_path)) == 75
    assert (tmp_path / "checkpoints" / "2").is_dir()


@pytest.mark.thorough
def test_the_evaluation_is_traced_once_though_it_comes_early(fake_config, tmp_path, monkeypatch):
    """The loop requests it while a thread traces it."""
    made, make = [], step.make_eval_step

    def slow(*args):
        made.append(args)
        time.sleep(0.5)
        return make(*args)

    monkeypatch.setattr(step, "make_eval_step", slow)
    fake_config.total, fake_config.eval_every = "2 steps", "1 steps"
    run(fake_config, tmp_path)
    assert len(made) == 1


def test_counts_of_a_log_line_do_not_overflow(fake_config, tmp_path):
    """They are int32: with an empty key the line at the end is of the whole run."""
    fake_config.total, fake_config.log_every = "2000M steps", ""
    with pytest.raises(UserError, match="log_every='': training metrics are sums over fewer than"):
        train.main(fake_config, Workdir(tmp_path / "run"))

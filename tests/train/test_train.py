"""Training on fake data: what it learns, meets before the first step, prints and profiles, and how it stops early."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from flax import linen as nn

import launch
from imgclf_jax.run import record, writers
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import command as train
from imgclf_jax.train import display, setup

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(("name", "values", "line"), [
    ("train", {"loss": 0.23017, "learning_rate": 1.9876e-3, "grad_norm": 1.0, "images_per_second": 12345.6},
     "step 113  epoch 5.0  train  loss 0.2302  images/s 12346"),
    ("test", {"examples": 360, "accuracy": 0.9694, "loss": 0.1154},
     "step 113  epoch 5.0  test  accuracy 0.9694  loss 0.1154"),
])  # fmt: skip
def test_a_line_of_a_record(name, values, line):
    assert display.line(113, 22.45, name, values) == line


@pytest.mark.thorough
def test_a_transcript(tmp_path):
    words = [sys.executable, str(ROOT / "launch.py"), f"--workdir={tmp_path}/run",
             "--config.total=2 epochs", "--config.eval_every=1 epochs"]  # fmt: skip
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    for fact in ("data       digits: 1,437 images of 28x28x1, 10 classes", "121,930 parameters",
                 "dense                102,464", "optimizer  adam", "seed       0",
                 "  test  accuracy "):  # fmt: skip
        assert fact in done.stderr
    assert f"report --workdir {tmp_path}/run" in done.stdout


# Without learning, the first evaluation is the best one.
KEYS = ("--config.data.source=fake(32, (4, 4, 1), 3)", "--config.preprocess=decode(1)", "--config.model=mlp",
        "--config.batch_size=8", "--config.optimizer=sgd", "--config.schedule=constant(0.0)", "--config.total=40 steps",
        "--config.eval_every=4 steps", "--config.log_every=7 steps", "--config.checkpoint_every=5 steps",
        "--config.checkpoint.keep=9", "--config.checkpoint.best=test/accuracy", "--config.tensorboard=False",
        "--config.stop=test/loss, patience 6 steps")  # fmt: skip
WHY = "test/loss has not improved for 8 steps: best "


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    assert launch.main([f"--workdir={workdir}", *KEYS]) == 0
    return workdir


def test_it_ends_at_the_first_evaluation_after_its_patience(stopped):
    """With a checkpoint and a result of that step, which says why."""
    result = json.loads((stopped / "result.json").read_text())
    assert (result["step"], result["stopped_early"].startswith(WHY)) == (12, True)
    records = writers.read_metrics(stopped / "metrics.jsonl")
    assert [r["step"] for r in records if "test/loss" in r] == [4, 8, 12]
    assert [r["step"] for r in records if "train/loss" in r] == [7]
    assert sorted(int(p.name) for p in (stopped / "checkpoints").iterdir() if p.name.isdigit()) == [4, 5, 8, 10, 12]
    run = record.read(stopped)
    assert (run.result, run.total) == (result, 40)


@pytest.mark.thorough
@pytest.mark.parametrize("gone", [["result.json", "checkpoints/12"], ["result.json"]])
def test_it_stops_at_the_same_step_when_resumed(stopped, tmp_path, capsys, printed, gone):
    copy = shutil.copytree(stopped, tmp_path / "run")
    for name in gone:
        place = copy / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert f"stopped early: {WHY}" in printed(f"--workdir={copy}", *KEYS)
    before, now = (json.loads((place / "result.json").read_text()) for place in (stopped, copy))
    for key in ("step", "params_sha256", "stopped_early", "test"):
        assert now[key] == before[key]
    assert launch.main([f"--workdir={copy}", *KEYS]) == 0
    assert "this run is done" in capsys.readouterr().err


def test_it_keeps_its_config_and_result_when_called_with_other_keys(stopped, tmp_path, capsys):
    copy = shutil.copytree(stopped, tmp_path / "run")
    assert launch.main([f"--workdir={copy}", *KEYS, "--config.metrics=auc", "--config.checkpoint.keep=1"]) == 0
    assert "this run is done" in capsys.readouterr().err
    for name in ("config.json", "result.json"):
        assert (copy / name).read_bytes() == (stopped / name).read_bytes()


def test_evaluations_that_are_not_recorded(stopped, tmp_path, capsys):
    without = shutil.ignore_patterns("12", "metrics.jsonl", "result.json")
    copy = shutil.copytree(stopped, tmp_path / "run", ignore=without)
    assert launch.main([f"--workdir={copy}", *KEYS]) == 1
    assert "metrics.jsonl has no test/loss of step 4, by which stop=" in capsys.readouterr().err
    assert launch.main([f"--workdir={copy}", *KEYS, "--config.eval_every=2 steps"]) == 1
    assert "eval_every: '4 steps' → '2 steps'" in capsys.readouterr().err

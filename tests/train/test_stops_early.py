"""A run that stops early, and resumed."""

import json
import shutil
from pathlib import Path

import pytest

import launch
from imgclf_jax.run import record, writers

pytestmark = pytest.mark.usefixtures("one_device")

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
    assert (run.final, run.total) == (result, 40)


@pytest.mark.thorough
@pytest.mark.parametrize("gone", [["result.json", "checkpoints/12"], ["result.json"]])
def test_it_stops_at_the_same_step_when_resumed(stopped, tmp_path, capsys, gone):
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    for name in gone:
        place = copy / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    capsys.readouterr()
    assert launch.main([f"--workdir={copy}", *KEYS]) == 0
    assert f"stopped early: {WHY}" in capsys.readouterr().out
    before, now = (json.loads((place / "result.json").read_text()) for place in (stopped, copy))
    for key in ("step", "params_sha256", "stopped_early", "test"):
        assert now[key] == before[key]
    assert launch.main([f"--workdir={copy}", *KEYS]) == 0
    assert "this run is done" in capsys.readouterr().err


def test_it_keeps_its_config_and_result_when_called_with_other_keys(stopped, tmp_path, capsys):
    """As any run that is done. config.json named metrics that the result does not have."""
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    assert launch.main([f"--workdir={copy}", *KEYS, "--config.metrics=auc", "--config.checkpoint.keep=1"]) == 0
    assert "this run is done" in capsys.readouterr().err
    for name in ("config.json", "result.json"):
        assert (copy / name).read_bytes() == (stopped / name).read_bytes()


def test_evaluations_that_are_not_recorded(stopped, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy, ignore=shutil.ignore_patterns("12", "metrics.jsonl", "result.json"))
    assert launch.main([f"--workdir={copy}", *KEYS]) == 1
    assert "metrics.jsonl has no test/loss of step 4, by which stop=" in capsys.readouterr().err
    assert launch.main([f"--workdir={copy}", *KEYS, "--config.eval_every=2 steps"]) == 1
    assert "eval_every: '4 steps' → '2 steps'" in capsys.readouterr().err

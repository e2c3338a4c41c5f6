"""The command `status`: what runs do, and where their time went."""

import json
import time

import pytest

import launch
from imgclf_jax import config as configs
from imgclf_jax.run import lock, record
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.status import command
from imgclf_jax.train import command as train


@pytest.fixture
def write(tmp_path):
    """Writes the files of a run of 20,000 steps: its last record and its result, if any."""

    def run(step, result=None, **record_values):
        config = configs.default_config()
        config.total, config.batch_size = "20000 steps", 50
        data = {"train_examples": 64, "image_shape": [12, 12, 1], "class_names": ["a", "b"], "fingerprint": "x"}
        (tmp_path / "config.json").write_text(configs.to_json(config))
        (tmp_path / "provenance.json").write_text(json.dumps({"data": data}))
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": step, "train/loss": 1.0, **record_values}) + "\n")
        if result:
            (tmp_path / "result.json").write_text(json.dumps(result))
        return record.read(tmp_path)

    return run


def test_the_time_left_of_a_run_that_trains_is_by_its_latest_pace(write, tmp_path):
    pace = {"train/images_per_second": 1000.0}
    run = write(6000, **pace)
    assert (command.read(run).state, command.read(run).seconds_left) == ("stopped", None)
    with lock.held(tmp_path / "lock"):
        found = command.read(run)
        assert (found.state, found.seconds_left) == ("running", 14_000 * 50 / 1000)
        assert command.read(write(0)).seconds_left is None
    (tmp_path / "nonfinite.json").write_text('{"step": 100}')
    assert command.read(write(100)).health == ["a bad step stopped the run: see nonfinite.json"]
    assert command.read(write(101)).health == []


def test_a_run_that_stopped_early_is_done(write):
    run = write(12, {"step": 12, "stopped_early": "test/loss has not improved"})
    assert (command.read(run).state, run.workdir.is_done()) == ("done", True)


def test_status_of_a_run(fake_config, tmp_path, capsys, printed, one_device):
    """Its phases are those of the clock; a run that is not done is stopped, and what went wrong is told."""
    began = time.time()
    assert train.main(fake_config, Workdir(tmp_path / "a")) == 0
    elapsed = time.time() - began
    [found] = json.loads(printed("status", str(tmp_path), "--format=json"))
    assert (found["state"], found["step"], found["total"], found["checkpoint"]) == ("done", 12, 12, 12)
    assert sum(found["seconds"].values()) == pytest.approx(elapsed, rel=0.05, abs=0.3)
    assert found["seconds"]["steps"] > 0
    assert found["health"] == []
    (tmp_path / "a" / "result.json").unlink()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "result.json").write_text("{}")
    assert launch.main(["status", str(tmp_path)]) == 1
    assert f"skipped: {tmp_path}/b holds no run: there is no {tmp_path}/b/config.json" in capsys.readouterr().err
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "train/skipped": 3}\n')
    out = printed("status", str(tmp_path / "a"))
    assert "stopped" in out
    assert "3 steps were skipped" in out


def test_it_takes_no_device(monkeypatch, tmp_path, capsys):
    """A run that trains holds the TPU of its host."""

    def taken():
        raise RuntimeError("The TPU is already in use by another process")

    monkeypatch.setattr("jax.devices", taken)
    (tmp_path / "result.json").write_text("{}")
    launch.main(["status", str(tmp_path)])
    assert "finds no devices" not in capsys.readouterr().err

"""The command `status`: what runs do, and where their time went."""

import json
import signal
import time

import pytest
import runs

import launch
from imgclf_jax import config as configs
from imgclf_jax.run import lock, record
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
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


def test_a_run_that_stopped_early_is_done(write):
    run = write(12, {"step": 12, "stopped_early": "test/loss has not improved"})
    assert (command.read(run).state, run.workdir.is_done()) == ("done", True)


def test_a_bad_step_is_told_until_the_run_trains_on(write, tmp_path):
    (tmp_path / "nonfinite.json").write_text('{"step": 100}')
    run = write(100)
    assert command.read(run).health == ["a bad step stopped the run: see nonfinite.json"]
    with lock.held(tmp_path / "lock"):
        assert command.read(run).health == []
    assert command.read(write(101)).health == []


@pytest.mark.thorough
def test_beside_a_run_that_trains_and_is_killed(tmp_path):
    words = ("--config.data.source=fake(256, (12, 12, 1), 4)", "--config.preprocess=decode(1)",
             "--config.model=mlp(widths=(16,))", "--config.total=400000 steps", "--config.log_every=5 steps",
             "--config.eval_every=", "--config.batch_size=24")  # fmt: skip
    [process], end = runs.start(tmp_path / "run", words), time.monotonic() + 180
    while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 5 and time.monotonic() < end:
        time.sleep(0.05)
    found = command.read(record.read(tmp_path / "run"))
    assert found.state == "running"
    assert found.seconds_left > 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert command.read(record.read(tmp_path / "run")).state == "stopped"


def test_status_of_a_run(fake_config, tmp_path, capsys, one_device):
    """Its phases are those of the clock; a run that is not done is stopped, and what went wrong is told."""
    began = time.time()
    assert train.main(fake_config, Workdir(tmp_path / "a")) == 0
    elapsed = time.time() - began
    capsys.readouterr()
    assert launch.main(["status", str(tmp_path), "--format=json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
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
    assert launch.main(["status", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
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

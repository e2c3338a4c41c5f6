"""The command `status`: what runs do, and where their time went."""

import json
import signal
import time

import pytest
import resume_check

import launch
from imgclf_jax.run import goodput
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train import loop as train


def test_status_of_a_run(fake_config, tmp_path, capsys, one_device):
    """Its phases are those of the clock; a run that is not done is stopped, and what went wrong is told."""
    began = time.time()
    assert train.main(fake_config, Workdir(tmp_path / "a")) == 0
    elapsed = time.time() - began
    [last] = goodput.last_of_each(read_metrics(tmp_path / "a" / goodput.NAME))
    inside = sum(seconds for name, seconds in last["seconds"].items() if name != "import")
    assert inside == pytest.approx(elapsed, rel=0.01, abs=0.3)
    assert last["seconds"]["steps"] > 0
    capsys.readouterr()
    assert launch.main(["status", str(tmp_path), "--format=json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["total"], found["checkpoint"]) == ("done", 12, 12, 12)
    assert sum(found["seconds"].values()) == pytest.approx(last["at"] - last["began"], abs=0.01)
    assert found["goodput"] == pytest.approx(last["seconds"]["steps"] / (last["at"] - last["began"]), rel=0.01)
    assert found["health"] == []
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert {one["phase"]: one["seconds"] for one in result["time"]} == pytest.approx(
        {name: seconds for name, seconds in found["seconds"].items() if seconds}, abs=0.01
    )
    assert result["goodput"] == pytest.approx(found["goodput"], abs=1e-3)
    (tmp_path / "a" / "result.json").unlink()
    (tmp_path / "a" / "hang-0.txt").write_text("")
    (tmp_path / "a" / "skipped.jsonl").write_text('{"step": 7, "seed": 0, "loss": null, "reason": "not finite"}\n')
    assert launch.main(["status", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "stopped" in out
    assert "steps skipped, the last is 7" in out
    assert "a process hung: see hang-0.txt" in out
    assert "setup" in out


def test_a_result_without_a_config_is_told_of(tmp_path, capsys):
    """The run was left out in silence, and later told of with its terminal escapes."""
    (tmp_path / "a\x1b[31m").mkdir()
    (tmp_path / "a\x1b[31m" / "result.json").write_text("{}")
    assert launch.main(["status", str(tmp_path)]) == 1
    place = rf"{tmp_path}/a\x1b[31m"
    assert f"skipped: {place} holds no run: there is no {place}/config.json" in capsys.readouterr().err


@pytest.mark.thorough
def test_killed_three_times(tmp_path, capsys):
    """The parts add up to the wall time within 1 %, and a running run has a time left."""
    words = ("--config.data.source=fake(256, (12, 12, 1), 4)", "--config.preprocess=decode(1)",
             "--config.model=mlp(widths=(16,))", "--config.total=4000 steps", "--config.batch_size=24",
             "--config.log_every=5 steps", "--config.eval_every=", "--config.checkpoint_every=100 steps")  # fmt: skip
    began = time.time()
    for number in range(3):
        process, saved = resume_check.start(tmp_path / "run", words), tmp_path / "run" / "checkpoints"
        end = time.monotonic() + 180
        while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 60 * (number + 1) and time.monotonic() < end:
            time.sleep(0.05)
        assert saved.is_dir()
        if number == 1:
            capsys.readouterr()
            assert launch.main(["status", str(tmp_path / "run"), "--format=json"]) == 0
            [found] = json.loads(capsys.readouterr().out)
            assert found["state"] == "running"
            assert found["seconds_left"] > 0
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert resume_check.start(tmp_path / "run", words).wait() == 0
    elapsed = (tmp_path / "run" / "result.json").stat().st_mtime - began
    total = goodput.sum_up(read_metrics(tmp_path / "run" / goodput.NAME))
    assert total["idle"] > 0
    assert total["recomputed"] >= 0
    assert sum(total.values()) == pytest.approx(elapsed, rel=0.01)

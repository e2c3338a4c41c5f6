"""A killed run ends, bit for bit, like an undisturbed one."""

import json
import random
import signal
import time

import launched
import pytest
import stress

import launch

pytestmark = pytest.mark.optimized
SHORT = ("--config.data.source=fake(256, (12, 12, 1), 4)", "--config.preprocess=decode(1)|random_resized_crop(10)",
         "--config.preprocess_eval=decode(1)|resize(10)", "--config.mix=mixup(0.2)",
         "--config.augment=flip_lr|flip_alternating|pad_crop(1)|normalize",
         "--config.model=mlp(widths=(16,), dropout=0.1)", "--config.total=500 steps", "--config.batch_size=24",
         "--config.log_every=7 steps", "--config.eval_every=110 steps",
         "--config.checkpoint_every=15 steps")  # fmt: skip
DIGITS = ("--config.total=800 steps", "--config.checkpoint_every=25 steps", "--config.log_every=10 steps",
          "--config.eval_every=90 steps", "--config.checkpoint.best=test/accuracy", "--config.on_bad_step=skip",
          "--config.check_every=60 steps",
          "--config.augment=pad_crop(2)|normalize|poisoned:poison(((3, 1), (900, 20), (41, 55)))")  # fmt: skip


@pytest.mark.thorough
@pytest.mark.usefixtures("one_device")
def test_killed_at_a_random_moment(tmp_path, capsys):
    """With random crops, flips, mixing and dropout, and logs, evaluations and checkpoints at different steps."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    [process], saved = launched.start(workdir, SHORT), workdir / "checkpoints"
    while process.poll() is None and not (saved.exists() and any(f.name.isdigit() for f in saved.iterdir())):
        time.sleep(0.01)
    time.sleep(random.Random(0).uniform(0.0, 0.1))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for folder in (whole, workdir):
        assert launch.main([f"--workdir={folder}", *SHORT]) == 0
    assert "resuming at step" in capsys.readouterr().err
    assert launched.outcome(workdir) == launched.outcome(whole)
    digests = [(folder / "digests.jsonl").read_text().splitlines() for folder in (workdir, whole)]
    assert digests[0] == digests[1]
    assert json.loads(digests[0][-1])["params_sha256"] == launched.outcome(whole)[0]
    steps = [json.loads(line)["step"] for line in digests[0]]
    assert steps == sorted({0, *(1 << n for n in range(9)), *range(15, 500, 15), 500})


@pytest.mark.slow
def test_disturbed_by_a_plan(tmp_path):
    """Kills, signals, a full disk and damaged files, for two minutes."""
    assert stress.disturb(120, 7, tmp_path) == 0


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    """On three poisoned batches, whose steps are skipped."""
    launched.finish(tmp_path / "whole", DIGITS)
    launched.kill_repeatedly(tmp_path / "killed", DIGITS, 20, random.Random(0))
    assert launched.outcome(tmp_path / "killed") == launched.outcome(tmp_path / "whole")
    assert json.loads((tmp_path / "killed" / "result.json").read_text())["skipped"]

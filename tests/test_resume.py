"""A killed run ends, bit for bit, like an undisturbed one."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import resume_check
import stress

import launch

pytestmark = pytest.mark.optimized
SHORT = (
    "--config.data.source=fake(256, (12, 12, 1), 4)",
    "--config.preprocess=decode(1)|random_resized_crop(10)",
    "--config.preprocess_eval=decode(1)|resize(10)",
    "--config.augment=flip_lr|flip_alternating|pad_crop(1)|normalize",
    "--config.mix=mixup(0.2)",
    "--config.model=mlp(widths=(16,), dropout=0.1)",
    "--config.total=500 steps",
    "--config.batch_size=24",
    "--config.log_every=7 steps",
    "--config.eval_every=110 steps",
    "--config.checkpoint_every=15 steps",
)


def finish(workdir: Path) -> tuple[str, list[dict]]:
    """The outcome of the run after this process has trained it to its end."""
    assert launch.main([f"--workdir={workdir}", *SHORT]) == 0
    return resume_check.outcome(workdir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, one_device) -> Path:
    """The work directory of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(workdir)
    return workdir


@pytest.fixture(scope="module")
def whole(undisturbed) -> tuple[str, list[dict]]:
    return resume_check.outcome(undisturbed)


@pytest.mark.thorough
def test_killed_at_a_random_moment(whole, undisturbed, tmp_path, capsys):
    """With random crops, flips, mixing and dropout, and logs, evaluations and checkpoints at different steps."""
    workdir = tmp_path / "run"
    process, saved = resume_check.start(workdir, SHORT), workdir / "checkpoints"
    while process.poll() is None and not (saved.exists() and any(f.name.isdigit() for f in saved.iterdir())):
        time.sleep(0.01)
    time.sleep(random.Random(0).uniform(0.0, 0.1))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    capsys.readouterr()
    assert finish(workdir) == whole
    assert "resuming at step" in capsys.readouterr().err
    assert_same_digests(workdir, undisturbed)


def assert_same_digests(workdir: Path, undisturbed: Path) -> None:
    """Line by line, at the powers of two, the checkpoints and the end."""
    digests = [(folder / "digests.jsonl").read_text().splitlines() for folder in (workdir, undisturbed)]
    assert digests[0] == digests[1]
    steps = [json.loads(line)["step"] for line in digests[0]]
    assert steps == sorted({0, *(1 << n for n in range(9)), *range(15, 500, 15), 500})


@pytest.mark.slow
def test_killed_at_random_moments(whole, undisturbed, tmp_path):
    """Each time in a separate process, or stopped by SIGTERM; the checkpoint that is truncated then is reported."""
    workdir, rng = tmp_path / "run", random.Random(0)
    numbers = (signal.SIGKILL, signal.SIGTERM) * 2
    ends = [resume_check.interrupt(workdir, SHORT, number, rng) for number in numbers]
    assert ends == [-signal.SIGKILL, 75] * 2
    step = resume_check.truncate_latest(workdir)
    resume_check.finish(workdir, SHORT)
    log = Path(f"{workdir}.log").read_text()
    assert f"checkpoints/{step} is damaged" in log
    assert "Traceback" not in log
    assert resume_check.outcome(workdir) == whole
    assert_same_digests(workdir, undisturbed)


@pytest.mark.slow
def test_disturbed_by_a_plan(tmp_path):
    """Kills, signals, a full disk, flipped bytes, bad hardware, hangs, readers and other clocks, for two minutes."""
    assert stress.disturb(120, 7, tmp_path) == 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_killed_twenty_times(policy, tmp_path):
    """Also on three poisoned batches, whose steps are skipped."""
    words = resume_check.DIGITS
    if policy != "stop":
        words += (f"--config.on_bad_step={policy}", "--config.check_every=60 steps",
                  "--config.augment=pad_crop(2)|normalize|faults:poison(((3, 1), (900, 20), (41, 55)))")  # fmt: skip
    resume_check.finish(tmp_path / "whole", words)
    resume_check.kill_repeatedly(tmp_path / "killed", words, 20, random.Random(0))
    assert resume_check.outcome(tmp_path / "killed") == resume_check.outcome(tmp_path / "whole")
    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert bool(result.get("skipped")) == (policy != "stop")

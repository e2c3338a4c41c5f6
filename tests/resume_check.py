"""Kills training runs at random moments: in start-up, in training, while a checkpoint is written."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMINGS = ("train/images_per_second", "train/input_wait")
DIGITS = ("--config.total=800 steps", "--config.checkpoint_every=25 steps", "--config.log_every=10 steps",
          "--config.eval_every=90 steps", "--config.checkpoint.best=test/accuracy")  # fmt: skip


def obey_signals() -> None:
    """Has signals end this process and those that it starts: a shell lets what is in the background ignore SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def start(workdir: Path, overrides: tuple[str, ...]) -> subprocess.Popen:
    """A training process in `workdir`; what it says goes to `workdir`.log."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{workdir}.log", "a") as log:
        command = [sys.executable, str(ROOT / "launch.py"), "train", f"--workdir={workdir}", *overrides]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}  # of modules that a config may name
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)


def finish(workdir: Path, overrides: tuple[str, ...]) -> None:
    """Lets a process run to its end."""
    status = start(workdir, overrides).wait()
    assert status == 0, f"exit status {status}; see {workdir}.log"


def interrupt(workdir: Path, overrides: tuple[str, ...], number: signal.Signals, rng: random.Random) -> int | None:
    """Starts a process and sends it a signal at a random moment; its exit status, None if it had ended by itself."""
    before = _size(workdir / "metrics.jsonl")
    process = start(workdir, overrides)
    if number == signal.SIGKILL and rng.random() < 0.25:
        time.sleep(rng.uniform(0.1, 8.0))  # imports, data, restoring, compiling
    else:
        while process.poll() is None and _size(workdir / "metrics.jsonl") <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.4))
    if process.poll() is not None:
        return None
    process.send_signal(number)
    return process.wait()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def truncate_latest(workdir: Path) -> int:
    """Cuts the largest file of the latest checkpoint in half; returns the checkpoint's step."""
    steps = [d for d in (workdir / "checkpoints").iterdir() if d.name.isdigit()]
    latest = max(steps, key=lambda d: int(d.name))
    file = max((f for f in latest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return int(latest.name)


def outcome(workdir: Path) -> tuple[str, list[dict]]:
    """The digest of the final parameters, and every record of metrics but for timings."""
    result = json.loads((workdir / "result.json").read_text())
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]
    return result["params_sha256"], records


def kill_repeatedly(workdir: Path, overrides: tuple[str, ...], kills: int, rng: random.Random) -> None:
    """Kills `kills` processes one after the other, then lets one finish."""
    for number in range(kills):
        ended = interrupt(workdir, overrides, signal.SIGKILL, rng)
        assert ended is not None, f"the run ended after {number} kills; make it longer"
    finish(workdir, overrides)

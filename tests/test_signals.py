"""Signals that ask a process to stop: each one, at each moment, to the process, to its group, and twice."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cases import flags, thorough
from launched import ROOT, outcome

import launch

# This process trains on as those do that it starts.
pytestmark = [pytest.mark.optimized, pytest.mark.usefixtures("one_device")]

# Asks itself to stop at a moment of its life, as another process would, and goes on.
PROGRAM = """
import functools, os, runpy, signal, sys, time
for name in (signal.SIGINT, signal.SIGTERM):  # which some shells let be ignored in the background
    signal.signal(name, signal.SIG_DFL)
moment, how, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
launch = sys.argv[4]

def ask():
    os.killpg(0, number) if how == "group" else os.kill(os.getpid(), number)
    if how == "twice":
        os.kill(os.getpid(), number)

def ask_first(owner, name, after=False):
    original = getattr(owner, name)
    @functools.wraps(original)
    def asking(*args, **kwargs):
        setattr(owner, name, original)
        if after:
            result = original(*args, **kwargs)
        ask()
        if moment == "compile":
            time.sleep(60)  # in which the process has long ended
        return result if after else original(*args, **kwargs)
    setattr(owner, name, asking)

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "jax":
            sys.meta_path.remove(self)
            ask()

if moment == "imports":
    sys.meta_path.insert(0, Finder())
else:
    sys.path.insert(0, os.path.dirname(launch))
    from imgclf_jax.run import environment
    environment.prepare(True)
    from imgclf_jax import datasets
    from imgclf_jax.train import evaluation, loop as train, setup as train_setup
    from imgclf_jax.run import checkpoint, writers
    owner, name, after = {
        "data": (datasets.sources, "open_splits", False),
        "compile": (train_setup, "_initialize", False),
        "log": (writers.MetricsWriter, "write_scalars", True),
        "evaluation": (evaluation, "evaluate", False),
        "save": (checkpoint.Checkpoints, "save", True),
    }[moment]
    ask_first(owner, name, after)
sys.argv = [launch, *sys.argv[5:]]
runpy.run_path(launch, run_name="__main__")
"""

RUN = flags("augment=normalize", "schedule=constant(1e-3)", "eval_every=12 steps", "checkpoint.best=test/accuracy",
            "tensorboard=False", "data.placement=device")  # fmt: skip
BEFORE = ("imports", "data", "compile")
CASES = (("imports", "SIGINT", "twice"), ("compile", "SIGTERM", "process"), ("data", "SIGTERM", "process"),
         ("log", "SIGINT", "group"), ("evaluation", "SIGTERM", "twice"), ("save", "SIGINT", "process"))  # fmt: skip


def finish(workdir: Path) -> tuple[str, list[dict]]:
    """Runs to the end in this process; returns the digest and the records without timings."""
    assert launch.main([f"--workdir={workdir}", *RUN]) == 0
    return outcome(workdir)


@pytest.mark.parametrize(("moment", "name", "how"), [*CASES[:2], *thorough(*CASES[2:])])
def test_it_stops_at_once_or_saves(moment, name, how, tmp_path):
    """The next process ends like a run that was let alone."""
    workdir, number, script = tmp_path / "run", str(signal.Signals[name].value), str(ROOT / "launch.py")
    command = [sys.executable, "-c", PROGRAM, moment, how, number, script, f"--workdir={workdir}", *RUN]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, start_new_session=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr
    if moment in BEFORE:
        assert done.returncode == 128 + signal.Signals[name], done.stderr
        assert done.stderr.splitlines()[-1] == f"{name}: stopped; nothing is lost; run the same command again"
        assert not [path for path in workdir.rglob("*") if path.is_file()]
    else:
        assert done.returncode == 75, done.stderr
        assert f"{name}: stopping after this step" in done.stderr
        assert f"{name}: stopped at step" in done.stderr
        assert not (workdir / "lock").exists()
        assert finish(workdir) == finish(tmp_path / "whole")

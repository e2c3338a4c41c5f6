"""Signals that ask a process to stop: each one, at each moment, to the process, to its group, and twice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cases import flags, thorough
from launched import ROOT, outcome

import launch
from imgclf_jax.core import stopping

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


@pytest.fixture(autouse=True)
def _default_handlers(monkeypatch):
    """Resets ignored signals, since some shells start background processes with SIGINT ignored."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which an ending process replaces
    before = {number: signal.signal(number, signal.SIG_DFL) for number in stopping.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_is_noted_inside_and_the_handlers_come_back(number, caplog):
    before = [signal.getsignal(one) for one in stopping.SIGNALS]
    with stopping.stopping() as stop:
        assert stop() == ""
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
        assert [stop(), stop()] == [number.name] * 2
    assert [signal.getsignal(one) for one in stopping.SIGNALS] == before
    assert caplog.messages == [f"{number.name}: stopping after this step, and saving a checkpoint"]


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_outside_it_ends_the_process_at_once(number, capfd):
    """With one line. A repeated signal, as `uv run` sends, does not interrupt the clean-up."""
    stopping.end_on_signals()

    def receive():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as raised:
        receive()
    assert raised.value.code == 128 + number
    assert capfd.readouterr().err == f"{number.name}: stopped; nothing is lost; run the same command again\n"


@pytest.mark.parametrize("where", ["gc.callbacks.append(ask); gc.collect()",
                                   "sys.meta_path.insert(0, Module); import anything"])  # fmt: skip
def test_it_ends_the_process_also_where_exceptions_are_dropped(where):
    """JAX has a callback of the garbage collector; a module in C++ that is interrupted aborts."""
    program = f"""if True:
        import contextlib, gc, os, signal, sys, time
        from imgclf_jax.core import stopping
        def ask(*_):
            os.kill(os.getpid(), signal.SIGTERM)
        class Module:
            def find_spec(*_):
                with contextlib.suppress(BaseException):
                    ask()
                time.sleep(60)
        stopping.end_on_signals()
        {where}
        time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    said = "SIGTERM: stopped; nothing is lost; run the same command again\n"
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, said)


def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopping.end_on_signals()
    os.kill(os.getpid(), signal.SIGINT)
    with stopping.stopping() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() == ""

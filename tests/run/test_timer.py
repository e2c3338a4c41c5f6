"""Where the time of a process goes, the watchdog that ends one in which nothing happens, and a trace of some steps."""

import subprocess
import sys
import time

import jax
import pytest
from cases import thorough
from launched import ROOT

from imgclf_jax.run.profiler import Profiler
from imgclf_jax.run.timer import PHASES, Timer


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: `clock[0]` in seconds."""
    now = [100.0]
    monkeypatch.setattr("imgclf_jax.run.timer.time.monotonic", lambda: now[0])
    return now


def test_the_phases_add_up_to_the_wall_time(clock):
    timer = Timer()
    before = sum(timer.seconds.values())
    for phase, seconds in (("compile", 3.0), ("steps", 2.0), ("input", 0.5), ("steps", 1.0), ("other", 0.25)):
        timer.enter(phase)
        clock[0] += seconds
    timer.beat()
    assert sum(timer.seconds.values()) - before == pytest.approx(6.75)
    assert (timer.seconds["steps"], timer.seconds["input"], timer.since_main) == (3.0, 0.5, 6.75)
    assert {"phase": "steps", "seconds": 3.0} in timer.summary()
    assert {one["phase"] for one in timer.summary()} <= set(PHASES)


def test_throughput(clock):
    """Images/s and the fraction of waiting, only over the phases of training since the last lap."""
    timer = Timer()

    def spend(seconds, phase, steps=0, counted_as=""):
        timer.enter(phase)
        clock[0] += seconds
        timer.steps += steps
        timer.enter("other", counted_as)

    spend(7.0, "input")  # of the first batch
    timer.restart_lap()
    spend(1000.0, "evaluation")
    spend(0.5, "input")
    spend(0.5, "input", counted_as="steps")  # the devices were busy
    spend(1.0, "steps", 10)
    assert timer.lap(32) == {"images_per_second": 160.0, "input_wait": 0.25}


HANGS = """
import sys, time
from imgclf_jax.run.timer import Timer
timer = Timer(0.4)
for _ in range(8):
    time.sleep(0.1)
    timer.enter("steps")
timer.enter("compile")
time.sleep(1.0)  # patience
timer.enter(sys.argv[1])
if sys.argv[2:]:
    timer.stop()
def waits_for_ever():
    time.sleep(5)
waits_for_ever()
"""


@pytest.mark.parametrize("stopped", [False, *thorough(True)])
def test_a_phase_without_an_end_ends_the_process(stopped):
    """With status 1 and the stacks; one that goes on, or may take long, or whose watchdog was stopped, is let be."""
    began = time.monotonic()
    words = [sys.executable, "-c", HANGS, "evaluation", *["stop"] * stopped]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == (not stopped)
    assert ("Timeout (0:00:00.400000)!" in done.stderr) is not stopped
    assert ("waits_for_ever" in done.stderr) is not stopped
    assert time.monotonic() - began > 2


def test_a_trace_holds_the_steps_from_the_first_to_before_the_last(tmp_path, monkeypatch):
    """Also of a run that resumes within them; one that ends early writes what it has."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    for steps, expected in (
        (range(6), [0, 1, "start", 2, 3, "stop", 4, 5]),
        (range(3, 6), ["start", 3, "stop", 4, 5]),
        (range(3), [0, 1, "start", 2, "stop"]),
        (range(4, 6), [4, 5]),
    ):
        calls.clear()
        profiler = Profiler((2, 4), tmp_path)
        for step in steps:
            profiler.before(step)
            calls.append(step)
            profiler.after(step + 1, jax.numpy.zeros(()))
        profiler.close()
        assert calls == expected

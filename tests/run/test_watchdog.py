"""A process in which nothing happens ends, and says what it waited for; and where the time of a process goes."""

import os
import re
import subprocess
import sys
import threading
import time
import types

import pytest
from resume_check import ROOT

from imgclf_jax import config as configs
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.run.phases import PHASES, Phases
from imgclf_jax.run.watchdog import PATIENCE, Watchdog


@pytest.fixture
def ended(monkeypatch):
    """The (status, line) that the process would have ended with."""
    lines = []
    monkeypatch.setattr("imgclf_jax.run.watchdog._leave", lambda line: lines.append((1, line)))
    return lines


def wait_until(done, seconds):
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("phase", "waits_for"),
    [
        ("steps", "the devices to compute"),
        ("input", "the next batch"),
        ("evaluation", "the next batch of an evaluation"),
    ],
)
def test_a_phase_without_an_end(phase, waits_for, tmp_path, ended):
    phases = Phases()
    with Watchdog(0.3, tmp_path, phases).watching():
        phases.enter(phase, 41)
        wait_until(lambda: ended, 20)
    status, line = ended[0]
    assert status == 1
    assert re.search(rf"nothing has happened for \d+ s \(watchdog\) after step 41: .* waits for {waits_for}", line)
    stacks = (tmp_path / "hang-0.txt").read_text()
    assert "thread MainThread:" in stacks
    assert "test_a_phase_without_an_end" in stacks


def test_process_0_is_stopped(tmp_path, ended, monkeypatch):
    """It serves the store through which processes hear of each other: the watchdog of another does not wait for it."""
    continued = threading.Event()
    service = dict.fromkeys(("key_value_set", "key_value_dir_get"), lambda *_, **__: continued.wait(20))
    for name, value in (("_count", 2), ("_index", 1), ("_client", lambda: types.SimpleNamespace(**service))):
        monkeypatch.setattr(processes, name, value)
    monkeypatch.setattr("imgclf_jax.run.watchdog._ANSWER", 0.1)
    phases = Phases()
    with Watchdog(0.3, tmp_path, phases).watching():
        phases.enter("steps", 41)
        wait_until(lambda: ended, 10)
        continued.set()
    assert "the process waits for the devices to compute; process 0 gives no sign of life" in ended[0][1]
    assert "thread MainThread:" in (tmp_path / "hang-1.txt").read_text()


def test_signs_of_life_and_patience(tmp_path, ended):
    """Phases that take long but beat, and those that may take long, end no process."""
    phases = Phases()
    with Watchdog(0.4, tmp_path, phases).watching():
        phases.enter("evaluation")
        for _ in range(10):
            time.sleep(0.1)
            phases.beat()
        phases.enter("compile")
        time.sleep(1.0)
        phases.enter("steps")
    assert not ended
    assert PATIENCE > 2


def test_a_suspended_process_does_not_hang(tmp_path, ended, monkeypatch):
    """A scheduler that stops a process for hours and continues it ends nothing."""
    now, slept = time.monotonic, [0.0]
    monkeypatch.setattr("imgclf_jax.run.watchdog.time.monotonic", lambda: now() + slept[0])
    phases = Phases()
    with Watchdog(1.0, tmp_path, phases).watching():
        phases.enter("steps")
        for _ in range(3):
            slept[0] += 3600.0
            time.sleep(0.2)
    assert not ended


def test_a_disk_that_hangs_does_not_keep_the_process(tmp_path, ended, monkeypatch, caplog):
    """The stacks are logged where they cannot be written."""
    monkeypatch.setattr("imgclf_jax.run.watchdog._SAVING", 0.2)
    monkeypatch.setattr("imgclf_jax.core.places.write_atomically", lambda *_: time.sleep(3))
    phases = Phases()
    phases.enter("checkpoint")
    watchdog = threading.Thread(target=Watchdog(0.3, tmp_path, phases)._end, args=("checkpoint", 2.0))
    watchdog.start()
    watchdog.join()
    assert "a checkpoint to be saved: the disk" in ended[0][1]
    assert "cannot be written" in ended[0][1]
    assert "thread MainThread" in caplog.text


@pytest.mark.parametrize(("text", "seconds"), [("90 s", 90), ("10 min", 600), ("1.5h", 5400), ("", 0)])
def test_times(text, seconds):
    assert configs.seconds(text, "watchdog") == seconds


@pytest.mark.parametrize("text", ["10", "0 s", "-1 min", "10 minutes", "5 epochs"])
def test_what_is_no_time(text):
    with pytest.raises(UserError, match=r"watchdog=.* is not a time above zero; write '90 s'"):
        configs.seconds(text, "watchdog")


def test_the_phases_add_up_to_the_age_of_the_process():
    """Against the clock of the system, from its start."""
    phases = Phases()
    for name in PHASES[1:]:
        phases.enter(name)
        time.sleep(0.01)
    phases.enter("steps", 7, counted_as="input")
    totals, age = phases.totals(), time.time() - phases.began
    elapsed = int(
        subprocess.run(["ps", "-o", "etimes=", "-p", str(os.getpid())], capture_output=True, text=True).stdout
    )
    assert sum(totals.values()) == pytest.approx(elapsed, abs=1.5)
    assert sum(totals.values()) == pytest.approx(age, abs=0.1)
    assert min(totals[name] for name in PHASES[1:] if name not in ("other", "setup")) >= 0.01
    assert totals["import"] > 0


HANGING = """
import time
import jax
import numpy as np

class Source:
    class_names, reads = ("a", "b"), 0

    def __len__(self):
        return 10**7  # too large to be kept in memory

    def fingerprint(self):
        return "hanging"

    def read(self, ids):
        Source.reads += 1
        if Source.reads > {reads}:
            time.sleep(3600)
        return {{"image": np.zeros((len(ids), 12, 12, 1), np.uint8), "label": (ids % 2).astype(np.int32)}}

def splits():
    return {{"train": Source(), "test": Source()}}

def slow(images):
    jax.debug.callback(lambda: time.sleep({seconds}))
    return images
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("reads", "seconds", "waits_for"), [(40, 0, "the next batch"), (10**9, 3600, "the devices to compute")]
)
def test_a_run_that_hangs(reads, seconds, waits_for, tmp_path):
    """A source that does not return any more, and an op on the device that never ends."""
    (tmp_path / "hanging.py").write_text(HANGING.format(reads=reads, seconds=seconds))
    words = [
        str(ROOT / "launch.py"), "train", f"--workdir={tmp_path}/run", "--config.data.source=hanging:splits()",
        "--config.preprocess=decode(1)", "--config.model=mlp(widths=(4,))", "--config.batch_size=16",
        "--config.schedule=constant(1e-3)", "--config.total=4000 steps", "--config.watchdog=4 s",
        "--config.log_every=", "--config.eval_every=", "--config.checkpoint_every=",
        *(["--config.augment=hanging:slow"] if seconds else []),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240, env=environment)
    assert process.returncode == 1, process.stderr[-500:]
    assert f"the process waits for {waits_for}" in process.stderr
    assert "thread MainThread" in (tmp_path / "run" / "hang-0.txt").read_text()

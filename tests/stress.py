"""Disturbs training runs by a seeded plan, and checks that each ends like one that was left alone.

    uv run python tests/stress.py --seconds 3600

Each round is one run in a work directory of its own, by one of SETUPS. Its processes are disturbed one after the other
until it ends: by kills, signals, full disks and damaged files. Then its parameters, records and results must be
those of the undisturbed run. The exit status is 1 if there is a fault: a run that cannot go on or does not end, other
parameters, records or results, or a status or a message that a process must not have.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import launched

from imgclf_jax.data.sampling import example_ids

# Seconds on a machine that does nothing else; they grow with the time that the undisturbed run takes.
LONGEST = 330  # that a process may take to end: it waits 300 s for the others
HEARTBEAT = 20  # between several processes
USUAL = 20  # that the undisturbed run takes
NOISE = 10**7  # examples: too many to be kept in memory, so that the source is read in every step
# Every 60th step is computed twice, and a watchdog waits for five minutes: a healthy machine raises no alarm.
RUN = ("--config.checkpoint_every=25 steps", "--config.log_every=10 steps", "--config.eval_every=90 steps",
       "--config.checkpoint.best=test/accuracy", "--config.check_every=60 steps", "--config.watchdog=5 min",
       "--config.on_bad_step=skip")  # fmt: skip
# Three batches are poisoned.
DIGITS = ("--config.total=500 steps",
          "--config.augment=pad_crop(2)|normalize|launched:poison(((3, 1), (900, 20), (41, 38)))")  # fmt: skip
_FIRSTS = tuple((int(example_ids(0, step, 32, NOISE)[0]), 0) for step in (100, 211, 305))
# A network with batch statistics.
STREAM = (f"--config.data.source=fake({NOISE}, (12, 12, 1), 4)", "--config.preprocess=decode(1)",
          f"--config.augment=normalize|launched:poison({_FIRSTS})", "--config.data.eval.test=test[:64]",
          "--config.batch_size=32", "--config.total=400 steps", "--config.model=launched:Smooth()",
          "--config.optimizer=sgd(momentum=0.9)", "--config.schedule=constant(0.05)")  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What a run computes, and where."""

    name: str
    overrides: tuple[str, ...]
    processes: int = 1
    devices: int = 1  # of each process


SETUPS = (
    Setup("digits", DIGITS),
    Setup("batch statistics, accumulation, bfloat16, EMA",
          (*STREAM, "--config.accumulate=2", "--config.precision=bfloat16", "--config.ema=0.9")),
    Setup("8 devices, fsdp", (*STREAM, "--config.mesh=data=2, fsdp=4"), devices=8),
    Setup("2 processes, fsdp", (*STREAM, "--config.mesh=fsdp=-1"), processes=2, devices=2),
)  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Fault(Exception):
    """What happened to a run."""


class Round:
    """One run: `rng` decides what happens to its processes. `count` counts what did."""

    def __init__(self, folder: Path, setup: Setup, rng: random.Random, count: collections.Counter, slow: float = 1.0):
        self.longest = LONGEST * slow
        self.heartbeat = round(HEARTBEAT * slow)
        self.setup, self.rng, self.count, self.folder = setup, rng, count, folder
        self.workdir = folder / "disk" / rng.choice(("plain", "a b", "é漢"))
        self.logs = [folder / f"run.log.{number}" for number in range(setup.processes)]
        self.overrides = (*RUN, *setup.overrides)
        if setup.overrides == DIGITS:
            self.overrides += (f"--config.data.placement={rng.choice(('host', 'device'))}",)

    def start(self) -> list[subprocess.Popen]:
        """The processes of the run."""
        return launched.start(self.workdir, self.overrides, self.setup.processes, self.setup.devices,
                          heartbeat=self.heartbeat, log=self.folder / "run")  # fmt: skip

    def sleep(self, started: list[subprocess.Popen]) -> None:
        """Until a random moment: in start-up, or some time after a record was written."""
        file = self.workdir / "metrics.jsonl"
        if self.rng.random() < 0.6:
            before = launched.size(file)
            wait_until(lambda: launched.size(file) > before or ended(started), self.longest)
        wait_until(lambda: ended(started), self.rng.uniform(0, 4))

    # What happens to the processes of a run. Each gives the statuses that they may end with.

    def kill(self, started: list[subprocess.Popen]) -> set[int]:
        """One of several, or all: the others end."""
        self.sleep(started)
        for process in self.rng.choice(([started[0]], [started[-1]], started)):
            process.kill()
        return {-signal.SIGKILL, *of_the_others(started)}

    def ask(self, started: list[subprocess.Popen]) -> set[int]:
        """A signal to a process or to its group, once or twice."""
        self.sleep(started)
        number, group, process = self.rng.choice(SIGNALS), self.rng.random() < 0.5, self.rng.choice(started)
        for _ in range(self.rng.choice((1, 2))):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number) if group else process.send_signal(number)
            time.sleep(0.05)
        # Before Python runs the first line of launch.py the operating system's own end is what happens.
        return {75, 128 + number, -number, *of_the_others(started)}

    def fill_disk(self, started: list[subprocess.Popen]) -> set[int]:
        """All space of the file system is taken for a while; the process may stop, and says why."""
        self.sleep(started)
        ballast = self.folder / "disk" / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        wait_until(lambda: ended(started), self.rng.uniform(0.5, 5))
        ballast.unlink()
        if self.rng.random() < 0.5:
            started[0].kill()
        return {1, -signal.SIGKILL, *of_the_others(started)}

    def said(self) -> str:
        """What the processes of the run have logged."""
        return "".join(log.read_text() for log in self.logs if log.exists())

    # What happens to files between two processes.

    def damage(self) -> None:
        """A bit of the latest checkpoint flips, or a file of it is cut short or removed, if there is one before it.

        Not of a run that is done: nothing trains it again, and `evaluate` refuses its checkpoint.
        """
        folders = (self.workdir / "checkpoints").glob("*")
        steps = sorted((d for d in folders if d.name.isdigit()), key=lambda d: int(d.name))
        if len(steps) < 2 or (self.workdir / "result.json").exists():
            return
        file = self.rng.choice(sorted(f for f in steps[-1].rglob("*") if f.is_file() and f.stat().st_size))
        content = bytearray(file.read_bytes())
        how = self.rng.choice(("flipped", "cut short", "removed"))
        content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        if how == "removed":
            file.unlink()
        else:
            file.write_bytes(content if how == "flipped" else content[: len(content) // 2])
        self.count[f"file {how}"] += 1

    def play(self) -> None:
        """Disturbs processes, some of them and their files, until the run ends."""
        for _ in range(self.rng.randrange(3, 8)):
            self.happen()
            if self.rng.random() < 0.4:
                self.damage()
        statuses = [process.wait(2 * self.longest) for process in self.start()]
        if any(statuses):
            raise Fault(f"the last processes ended with {statuses}")
        if "Traceback" in self.said():
            raise Fault("a traceback")

    def happen(self) -> None:
        """Starts the processes of the run, and something happens to them."""
        happening = self.rng.choice((*(self.kill,) * 3, *(self.ask,) * 2, self.fill_disk))
        started = self.start()
        try:
            allowed = happening(started)
            if not wait_until(lambda: ended(started), self.longest):
                raise Fault(f"{happening.__name__}: the processes do not end")
        finally:
            for process in started:
                process.kill()
                process.wait()
        self.count[happening.__name__.replace("_", " ")] += 1
        statuses = {process.returncode for process in started}
        if not statuses <= {0, *allowed}:
            raise Fault(f"{happening.__name__}: status {statuses}")


def of_the_others(started: list[subprocess.Popen]) -> set[int]:
    """Statuses of processes that another one has left."""
    return {1, -signal.SIGABRT} if len(started) > 1 else set()


def ended(started: list[subprocess.Popen]) -> bool:
    """Whether all processes have ended."""
    return all(process.poll() is not None for process in started)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Waits until the condition holds, for so many seconds at most; whether it does."""
    end = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return holds


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A folder with a file system of 30 MB, `disk`; without the right to mount one, a folder that is never filled."""
    disk = place / "disk"
    disk.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        Round.fill_disk = Round.kill  # type: ignore[method-assign]
    try:
        yield place
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        shutil.rmtree(place, ignore_errors=True)


def whole(folder: Path, setup: Setup) -> tuple[object, float]:
    """The outcome of the run by `setup` that is left alone, and the seconds it took; it is trained once."""
    one = Round(folder / f"whole{SETUPS.index(setup)}", setup, random.Random(0), collections.Counter())
    if not (one.workdir / "result.json").exists():
        if any(launched.end(one.start())):
            raise SystemExit(one.said())
        print(f"left alone ({setup.name}): {launched.outcome(one.workdir)[0][:8]}", flush=True)
    times = json.loads((one.workdir / "result.json").read_text())["time"]
    return launched.outcome(one.workdir), sum(part["seconds"] for part in times)


def disturb(seconds: float, seed: int, folder: Path) -> int:
    """Rounds until the time is over; prints what happened; the number of rounds that went wrong."""
    began, count, faults, number = time.monotonic(), collections.Counter[str](), 0, 0
    while time.monotonic() - began < seconds:
        setup, rng = SETUPS[number % len(SETUPS)], random.Random(f"{seed}/{number}")
        expected, took = whole(folder, setup)
        with small_disk(folder / f"round{number}") as place:
            one = Round(place, setup, rng, count, max(1.0, took / USUAL))
            try:
                one.play()
                if launched.outcome(one.workdir) != expected:
                    raise Fault("the parameters or the records are others")
                count["rounds equal"] += 1
            except (Fault, subprocess.TimeoutExpired) as e:
                faults += 1
                shutil.copytree(place, folder / f"wrong{number}")
                print(f"WRONG ({setup.name}), kept in {folder}/wrong{number}: {e}", flush=True)
        number += 1
        print(f"{time.monotonic() - began:.0f} s, round {number}: {dict(count)}", flush=True)
    print(f"{number} rounds in {time.monotonic() - began:.0f} s: {faults} wrong; {dict(sorted(count.items()))}")
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the plan")
    args, folder = parser.parse_args(), Path(tempfile.mkdtemp(prefix="stress"))
    print(f"in {folder}", flush=True)
    for number in SIGNALS:  # a shell lets what is in the background ignore SIGINT
        signal.signal(number, signal.SIG_DFL)
    sys.exit(min(1, disturb(args.seconds, args.seed, folder)))

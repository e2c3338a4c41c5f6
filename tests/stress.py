"""Disturbs training runs by a seeded plan, and checks that each ends like one that was left alone.

    uv run python tests/stress.py --seconds 3600            # kills, full disks, damage, bad hardware, hangs, …
    uv run python tests/stress.py --seconds 3600 --memory   # one long run, whose memory must not grow

Each round is one run in a work directory of its own, by one of SETUPS. Its processes are disturbed one after the other
until it ends. Then its parameters, records and results must be those of the undisturbed run. The verdict counts three
faults, and the exit status is 1 if there is any:

- lost: a run that cannot go on, a flipped bit that is not found, a hang that does not end
- wrong: other parameters, records or results; a status or a message that a process must not have
- false alarms: corruption that is reported where there is none
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

import numpy as np
import runs

from imgclf_jax.data.sampling import example_ids

# Seconds on a machine that does nothing else; they grow with the time that the undisturbed run takes.
LONGEST = 180  # that a process may take to end
WATCHDOG, PAUSE, HEARTBEAT = 10, 13, 20  # in a process that hangs or is suspended
USUAL = 20  # that the undisturbed run takes
NOISE = 10**7  # examples of faults:noise()
# Every 60th step is computed twice, and a hang of five minutes ends a process: a healthy machine raises no alarm.
RUN = ("--config.checkpoint_every=25 steps", "--config.log_every=10 steps", "--config.eval_every=90 steps",
       "--config.checkpoint.best=test/accuracy", "--config.check_every=60 steps", "--config.watchdog=5 min",
       "--config.on_bad_step=skip")  # fmt: skip
# Three batches are poisoned.
DIGITS = ("--config.total=500 steps",
          "--config.augment=pad_crop(2)|normalize|faults:poison(((3, 1), (900, 20), (41, 38)))")  # fmt: skip
_FIRSTS = tuple((int(example_ids(0, step, 32, NOISE)[0]), 0) for step in (100, 211, 305))
# A source that is read in every step, and a network with batch statistics.
STREAM = ("--config.data.source=faults:noise()", "--config.preprocess=decode(1)", "--config.data.eval.test=test[:64]",
          "--config.batch_size=32", f"--config.augment=normalize|faults:poison({_FIRSTS})", "--config.total=400 steps",
          "--config.model=smooth_net:Smooth()", "--config.optimizer=sgd(momentum=0.9)",
          "--config.schedule=constant(0.05)")  # fmt: skip


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
    """(kind, what happened): a run was lost, something is wrong, or a false alarm was raised."""


class Round:
    """One run: `rng` decides what happens to its processes. `count` counts what did."""

    def __init__(
        self, folder: Path, setup: Setup, rng: random.Random, count: collections.Counter, slowness: float = 1.0
    ):
        self.longest, self.watchdog = LONGEST * slowness, round(WATCHDOG * slowness)
        self.pause_seconds, self.heartbeat = PAUSE * slowness, round(HEARTBEAT * slowness)
        self.setup, self.rng, self.count, self.folder = setup, rng, count, folder
        self.workdir = folder / "disk" / rng.choice(("plain", "a b", "é漢"))
        self.logs = [folder / f"run.log.{number}" for number in range(setup.processes)]
        self.faults = folder / "faults"  # what bad hardware has done
        self.overrides = (*RUN, *setup.overrides)
        if setup.overrides == DIGITS:
            self.overrides += (f"--config.data.placement={rng.choice(('host', 'device'))}",)

    def start(self, faults: dict | None = None, more: tuple[str, ...] = ()) -> list[subprocess.Popen]:
        """The processes of the run; `faults` are those of the hardware of one of them, see `faults.py`."""
        bad = {self.rng.randrange(self.setup.processes): {"FAULTS": json.dumps(faults or {}),
                                                          "FAULTS_LOG": str(self.faults)}}  # fmt: skip
        return runs.start(self.workdir, (*self.overrides, *more), self.setup.processes, self.setup.devices,
                          heartbeat=self.heartbeat, more=bad, log=self.folder / "run")  # fmt: skip

    def wait_for_record(self, started: list[subprocess.Popen]) -> None:
        """Until a record was written, or the processes have ended."""
        file = self.workdir / "metrics.jsonl"
        before = runs.size(file)
        wait_until(lambda: runs.size(file) > before or ended(started), self.longest)

    def sleep(self, started: list[subprocess.Popen]) -> None:
        """Until a random moment: in start-up, or some time after a record was written."""
        if self.rng.random() < 0.6:
            self.wait_for_record(started)
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

    def pause(self, started: list[subprocess.Popen]) -> set[int]:
        """All processes are suspended, as a scheduler does."""
        self.sleep(started)
        for number, wait in ((signal.SIGSTOP, self.pause_seconds), (signal.SIGCONT, 0.0)):
            for process in started:
                process.send_signal(number)
            time.sleep(wait)
        return set()

    def stop_one(self, started: list[subprocess.Popen]) -> set[int]:
        """One of several processes is stopped in training: the others end, and name it."""
        self.wait_for_record(started)
        time.sleep(self.rng.uniform(0, 2))
        which = self.rng.randrange(len(started))
        if ended(started):
            return set()
        said = len(self.said())
        started[which].send_signal(signal.SIGSTOP)
        others = [process for process in started if process is not started[which]]
        # The run may be over but for the last barrier, which has a limit of its own.
        if not wait_until(lambda: ended(others), self.longest):
            raise Fault("lost", "the others wait for a stopped process for ever")
        started[which].kill()
        # Without process 0, nobody can tell which one is missing.
        if which and f"process {which}" not in self.said()[said:] and any(process.returncode for process in others):
            raise Fault("wrong", f"process {which} was stopped, and is not named")
        return {1, -signal.SIGKILL}

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
        return {1, -signal.SIGKILL}

    def flip(self) -> tuple[list[subprocess.Popen], set[int]]:
        """A device computes another bit in a step that is computed twice: the run ends, and the next one goes on."""
        number, before = len(self.done("flip")), len(self.said())
        started = self.start({"flip": self.rng.randrange(4), "seed": self.rng.randrange(10**6)})
        wait_until(lambda: ended(started), self.longest)
        flipped = len(self.done("flip")) > number
        if flipped and "gives other bits when it is computed again" not in self.said()[before:]:
            raise Fault("lost", f"a flipped bit was not found: {self.done('flip')[-1]}")
        self.count["flips found"] += flipped
        return started, {1} if flipped else set()

    def hang(self) -> tuple[list[subprocess.Popen], set[int]]:
        """A source that never returns: the watchdog ends the process."""
        hangs, before = len(self.done("hang")), len(self.said())
        started = self.start({"hang": self.rng.randrange(2, 40)}, (f"--config.watchdog={self.watchdog} s",))
        wait_until(lambda: len(self.done("hang")) > hangs or ended(started), self.longest)
        if len(self.done("hang")) == hangs:  # the run was over before
            return started, set()
        if not wait_until(lambda: ended(started), self.longest):
            raise Fault("lost", "a source that hangs does not end the process")
        if "Timeout (" not in self.said()[before:]:
            raise Fault("wrong", f"a source hangs, and no message says so: {self.said()[before:][-2000:]}")
        self.count["hangs ended"] += 1
        return started, {1}

    def said(self) -> str:
        """What the processes of the run have logged."""
        return "".join(log.read_text() for log in self.logs if log.exists())

    def done(self, what: str) -> list[str]:
        """The lines of what bad hardware has done that begin with `what`."""
        lines = self.faults.read_text().splitlines() if self.faults.exists() else []
        return [line for line in lines if line.startswith(what)]

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

    def tear(self) -> None:
        """A record that was being written when the machine stopped; a result cut short."""
        with contextlib.suppress(FileNotFoundError), (self.workdir / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 99, "train/lo')
        if (self.workdir / "result.json").exists():
            (self.workdir / "result.json").write_bytes(b'{"step"')
        self.count["file torn"] += 1

    def play(self) -> None:
        """Disturbs processes, some of them and their files, until the run ends."""
        for _ in range(self.rng.randrange(3, 8)):
            self.happen()
            for change in (self.damage, self.tear):
                if self.rng.random() < 0.25:
                    change()
        statuses = [process.wait(2 * self.longest) for process in self.start()]
        if any(statuses):
            raise Fault("lost", f"the last processes ended with {statuses}")
        self.check()

    def happen(self) -> None:
        """Starts the processes of the run, and something happens to them."""
        hardware = (self.flip, self.hang) if self.setup.overrides != DIGITS else (self.flip,)
        others = self.stop_one if self.setup.processes > 1 else self.fill_disk
        happening = self.rng.choice((*(self.kill,) * 3, *(self.ask,) * 2, self.pause, others, *hardware))
        started: list[subprocess.Popen] = []
        try:
            if happening in hardware:
                started, allowed = happening()
            else:
                started = self.start()
                allowed = happening(started)
            if not wait_until(lambda: ended(started), self.longest):
                raise Fault("lost", f"{happening.__name__}: the processes do not end")
        finally:
            for process in started:
                process.kill()
                process.wait()
        self.count[happening.__name__.replace("_", " ")] += 1
        statuses = {process.returncode for process in started}
        if not statuses <= {0, *allowed}:
            raise Fault("wrong", f"{happening.__name__}: status {statuses}")

    def check(self) -> None:
        """Looks for false alarms, and for what no log may have."""
        # On a full disk TensorStore calls an event loop that is closed, and Python closes a lock that it cannot write.
        ignored = ("RuntimeError: Event loop is closed", "Exception ignored in")
        if self.said().count("Traceback") > sum(self.said().count(each) for each in ignored):
            raise Fault("wrong", "a traceback")
        if self.said().count("gives other bits") > len(self.done("flip")):
            raise Fault("false alarms", "corruption is reported that there was not")
        if missed := self.done("missed"):
            raise Fault("lost", f"a flipped bit {missed[0]}")


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
        if any(runs.end(one.start())):
            raise SystemExit(one.said())
        one.check()
        print(f"left alone ({setup.name}): {runs.outcome(one.workdir)[0][:8]}", flush=True)
    times = json.loads((one.workdir / "result.json").read_text())["time"]
    return runs.outcome(one.workdir), sum(part["seconds"] for part in times)


def disturb(seconds: float, seed: int, folder: Path) -> int:
    """Rounds until the time is over; prints what happened; the number of rounds that went wrong."""
    began, count, faults, number = time.monotonic(), collections.Counter[str](), collections.Counter[str](), 0
    while time.monotonic() - began < seconds:
        setup, rng = SETUPS[number % len(SETUPS)], random.Random(f"{seed}/{number}")
        expected, took = whole(folder, setup)
        with small_disk(folder / f"round{number}") as place:
            one = Round(place, setup, rng, count, max(1.0, took / USUAL))
            try:
                one.play()
                if runs.outcome(one.workdir) != expected:
                    raise Fault("wrong", "the parameters or the records are others")
                count["rounds equal"] += 1
            except (Fault, subprocess.TimeoutExpired) as e:
                kind, what = e.args if isinstance(e, Fault) else ("lost", e)
                faults[kind] += 1
                shutil.copytree(place, folder / f"wrong{number}")
                print(f"{kind.upper()} ({setup.name}), kept in {folder}/wrong{number}: {what}", flush=True)
        number += 1
        print(f"{time.monotonic() - began:.0f} s, round {number}: {dict(count)}", flush=True)
    verdict = ", ".join(f"{faults[kind]} {kind}" for kind in ("lost", "wrong", "false alarms"))
    print(f"{number} rounds in {time.monotonic() - began:.0f} s: {verdict}; {dict(sorted(count.items()))}")
    return faults.total()


def watch_memory(seconds: float, folder: Path) -> int:
    """One long run of `digits`; 1 if its resident memory grows by more than saves may leak, see docs/reliability.md."""
    words = ("--config.total=1000000000 steps", "--config.checkpoint_every=100 steps")
    [process] = runs.start(folder / "long", words)
    until, used = time.monotonic() + seconds, []
    while time.monotonic() < until and process.poll() is None:
        time.sleep(seconds / 600)
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        used.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
    process.terminate()
    if process.wait() != 75:
        raise SystemExit((folder / "long.log.0").read_text())
    middle, last = (float(np.median(part)) for part in (used[300:360], used[540:]))
    steps = json.loads((folder / "long" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    allowed = 30 + 0.02 * steps / 100 / 2  # MB: caches of threads, and 20 kB a save
    print(f"{steps} steps: {middle:.1f} MB in the middle, {last:.1f} MB at last; {allowed:.1f} MB more are allowed")
    return int(last > middle + allowed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the plan")
    parser.add_argument("--memory", action="store_true", help="watch one long run instead")
    args = parser.parse_args()
    for number in SIGNALS:  # a shell lets what is in the background ignore SIGINT
        signal.signal(number, signal.SIG_DFL)
    folder = Path(tempfile.mkdtemp(prefix="stress"))
    print(f"in {folder}", flush=True)
    return watch_memory(args.seconds, folder) if args.memory else min(1, disturb(args.seconds, args.seed, folder))


if __name__ == "__main__":
    sys.exit(main())

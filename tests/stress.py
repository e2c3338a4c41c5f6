"""Disturbs training runs by a seeded plan, and checks that each ends like one that was left alone.

    uv run python tests/stress.py --seconds 3600            # kills, full disks, bad hardware, hangs, …
    uv run python tests/stress.py --seconds 3600 --memory   # one long run, whose memory must not grow

Each round is one run in a work directory of its own, by one of SETUPS. Its processes are disturbed one after the other
until it ends. Then its parameters, records and results must be those of the undisturbed run. Some rounds
are left alone, with seeds of their own. The verdict counts three faults, and the exit status is 1 if there is any:

- lost: a run that cannot go on, a flipped bit that is not found, a hang that does not end
- wrong: other parameters, records or results; a status or a message that a process must not have
- false alarms: corruption that is reported where there is none

With `--memory` the status is 1 if memory grows.
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

from processes_check import find_port
from resume_check import ROOT, obey_signals, outcome
from stress_memory import watch_memory

from imgclf_jax.data.sampling import example_ids

# Seconds on a machine that does nothing else; they grow with the time that the undisturbed run takes.
LONGEST = 180  # that a process may take to end
WATCHDOG, PAUSE, HEARTBEAT = 10, 13, 20  # in a process that hangs or is suspended
USUAL = 20  # that the undisturbed run takes
NOISE = 10**7  # examples of faults:noise()
# Every 60th step is computed twice, and a hang of five minutes ends a process: a healthy machine raises no alarm.
RUN = ("--config.checkpoint_every=25 steps", "--config.log_every=10 steps", "--config.eval_every=90 steps",
       "--config.checkpoint.best=test/accuracy", "--config.check_every=60 steps",
       "--config.watchdog=5 min")  # fmt: skip
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

    @property
    def streams(self) -> bool:
        """Whether the source is read in every step."""
        return STREAM[0] in self.overrides


SKIP = "--config.on_bad_step=skip"
SETUPS = (
    Setup("digits, skip", (*DIGITS, SKIP)),
    Setup("batch statistics, accumulation, bfloat16, EMA",
          (*STREAM, SKIP, "--config.accumulate=2", "--config.precision=bfloat16", "--config.ema=0.9")),
    Setup("8 devices, fsdp", (*STREAM, SKIP, "--config.mesh=data=2, fsdp=4"), devices=8),
    Setup("8 devices, replicas", (*STREAM, SKIP), devices=8),
    Setup("2 processes", (*STREAM, SKIP), processes=2, devices=2),
    Setup("2 processes, fsdp", (*STREAM, SKIP, "--config.mesh=fsdp=-1"), processes=2, devices=2),
)  # fmt: skip
NAMES = ("plain", "lr=[0.1]", "a b", "é漢", "x*y?")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHIFTED = """
import runpy, sys, time
clock, offset = time.time, float(sys.argv[1])
time.time = lambda: clock() + offset
sys.argv = sys.argv[2:]
sys.path[0] = {root!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Wrong(Exception):
    """A process did what it must not do."""

    kind = "wrong"


class Lost(Wrong):
    """A run cannot go on, or a fault is not found."""

    kind = "lost"


class FalseAlarm(Wrong):
    """A fault is reported where there is none."""

    kind = "false alarms"


class Round:
    """One run: `rng` decides what happens to its processes. `count` counts what did."""

    def __init__(
        self, folder: Path, setup: Setup, rng: random.Random, count: collections.Counter, slowness: float = 1.0
    ):
        self.longest, self.watchdog = LONGEST * slowness, round(WATCHDOG * slowness)
        self.pause_seconds, self.heartbeat = PAUSE * slowness, round(HEARTBEAT * slowness)
        self.setup, self.rng, self.count, self.folder = setup, rng, count, folder
        self.workdir = folder / rng.choice(NAMES)
        self.logs = [folder / f"log{number}" for number in range(setup.processes)]
        self.faults = folder / "faults"  # what bad hardware has done
        self.overrides = [*RUN, *setup.overrides]
        if not setup.streams:
            self.overrides.append(f"--config.data.placement={rng.choice(('host', 'device'))}")

    def start(
        self,
        command: str = "train",
        log: Path | None = None,
        faults: dict | None = None,
        of: int = 0,
        more: tuple[str, ...] = (),
    ) -> list[subprocess.Popen]:
        """The processes of a command, each in a group of its own, sometimes under another clock.

        `faults` are those of the hardware of process `of`, see `faults.py`.
        """
        start, processes = [sys.executable], self.setup.processes if command == "train" else 1
        if self.rng.random() < 0.2:
            self.count["clock moved"] += 1
            start += ["-c", SHIFTED.format(root=str(ROOT)), str(self.rng.uniform(-1e8, 1e8))]
        started, port = [], find_port() if processes > 1 else 0
        for number in range(processes):
            words = [str(ROOT / "launch.py"), command, f"--workdir={self.workdir}"]
            words += [*self.overrides, *more] if command == "train" else ["--trust"]
            if processes > 1:
                words += [f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={number}",
                          f"--heartbeat={self.heartbeat}"]  # fmt: skip
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "JAX_PLATFORMS": "cpu",
                           "JAX_NUM_CPU_DEVICES": str(self.setup.devices), "FAULTS_LOG": str(self.faults)}  # fmt: skip
            if faults and number == of:
                environment["FAULTS"] = json.dumps(faults)
            with (log or self.logs[number]).open("a") as file:
                started.append(subprocess.Popen([*start, *words], stdout=file, stderr=file, cwd=ROOT, env=environment,
                                                start_new_session=True))  # fmt: skip
        return started

    def sleep(self, started: list[subprocess.Popen], longest: float) -> None:
        """Until a random moment: in start-up, or some time after a record was written."""
        if self.rng.random() < 0.6:
            before = self.size()
            wait_until(lambda: self.size() > before or ended(started), self.longest)
        limit = self.rng.uniform(0, longest)
        wait_until(lambda: ended(started), limit)

    def size(self) -> int:
        file = self.workdir / "metrics.jsonl"
        return file.stat().st_size if file.exists() else 0

    def checkpoints(self) -> list[Path]:
        folder = self.workdir / "checkpoints"
        steps = [d for d in folder.iterdir() if d.name.isdigit()] if folder.exists() else []
        return sorted(steps, key=lambda d: int(d.name))

    # What happens to the processes of a run. Each gives the statuses that they may end with.

    def kill(self, started: list[subprocess.Popen]) -> set[int]:
        """One of several, or all: the others end."""
        self.sleep(started, 4)
        several = len(started) > 1
        for process in self.rng.choice(([started[0]], [started[-1]], started)):
            process.kill()
        return {-signal.SIGKILL, *([1, -signal.SIGABRT] if several else [])}

    def ask(self, started: list[subprocess.Popen]) -> set[int]:
        """A signal to a process or to its group, once or twice."""
        self.sleep(started, 4)
        number, group, process = self.rng.choice(SIGNALS), self.rng.random() < 0.5, self.rng.choice(started)
        for _ in range(self.rng.choice((1, 2))):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number) if group else process.send_signal(number)
            time.sleep(0.05)
        self.count[number.name] += 1
        # Before Python runs the first line of launch.py the operating system's own end is what happens.
        return {75, 128 + number, -number, *([1, -signal.SIGABRT] if len(started) > 1 else [])}

    def pause(self, started: list[subprocess.Popen]) -> set[int]:
        """All processes are suspended, as a scheduler does."""
        self.sleep(started, 4)
        for number, wait in ((signal.SIGSTOP, self.pause_seconds), (signal.SIGCONT, 0.0)):
            for process in started:
                process.send_signal(number)
            time.sleep(wait)
        return set()

    def stop_one(self, started: list[subprocess.Popen]) -> set[int]:
        """One of several processes is stopped in training: the others end, and name it."""
        before = self.size()
        wait_until(lambda: self.size() > before or ended(started), self.longest)
        time.sleep(self.rng.uniform(0, 2))
        which = self.rng.randrange(len(started))
        if ended(started):
            return set()
        said = [log.stat().st_size for log in self.logs]
        started[which].send_signal(signal.SIGSTOP)
        others = [process for process in started if process is not started[which]]
        # The run may be over but for the last barrier, which has a limit of its own.
        if not wait_until(lambda: ended(others), self.longest):
            raise Lost("the others wait for a stopped process for ever")
        started[which].kill()
        text = "".join(log.read_text()[at:] for log, at in zip(self.logs, said, strict=True))
        # Without process 0, nobody can tell which one is missing.
        if which and f"process {which}" not in text and any(process.returncode for process in others):
            raise Wrong(f"process {which} was stopped, and is not named")
        return {1, -signal.SIGKILL}

    def fill_disk(self, started: list[subprocess.Popen]) -> set[int]:
        """All space of the file system is taken for a while; the process may stop, and says why."""
        self.sleep(started, 2)
        ballast = self.folder / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        wait_until(lambda: ended(started), self.rng.uniform(0.5, 5))
        ballast.unlink()
        started[0].kill() if self.rng.random() < 0.5 else None
        return {1, -signal.SIGKILL}

    def second_run(self, started: list[subprocess.Popen]) -> set[int]:
        """One of the two is refused, and the other one does not notice: the first, unless it had not begun."""
        self.sleep(started, 1)
        log = self.folder / "second.log"
        log.unlink(missing_ok=True)
        statuses = [process.wait(self.longest) for process in self.start(log=log)]
        refused = set(statuses) == {1} and "is in use by another" in log.read_text()
        if any(statuses) and not refused:
            raise Wrong(f"a second run ended with {statuses}: {log.read_text()}")
        self.count["second run refused"] += refused
        return set() if refused else {1}

    def read(self, started: list[subprocess.Popen]) -> set[int]:
        """`evaluate` beside the run."""
        self.sleep(started, 1)
        log = self.folder / "reader.log"
        log.unlink(missing_ok=True)
        before = bool(self.checkpoints())
        [reader] = self.start("evaluate", log=log)
        status, text = reader.wait(self.longest), log.read_text()
        if "Traceback" in text or (status and before):
            raise Wrong(f"evaluate ended with {status}: {text}")
        self.count["evaluated beside the run"] += status == 0
        return set()

    # What the hardware does.

    def flip(self) -> tuple[list[subprocess.Popen], set[int]]:
        """A device computes another bit in a step that is computed twice: the run ends, and the next one goes on."""
        number, before = len(self.flips("flip")), len(self.said())
        plan = {"flip": "step", "seed": self.rng.randrange(10**6), "after": self.rng.randrange(4)}
        started = self.start(faults=plan, of=self.rng.randrange(self.setup.processes))
        wait_until(lambda: ended(started), self.longest)
        flipped = len(self.flips("flip")) > number
        if flipped and "gives other bits when it is computed again" not in self.said()[before:]:
            raise Lost(f"a flipped bit was not found: {self.flips('flip')[-1]}")
        self.count["flips found" if flipped else "too late for a flip"] += 1
        return started, {1} if flipped else set()

    def hang(self) -> tuple[list[subprocess.Popen], set[int]]:
        """A source that never returns: the watchdog ends the process."""
        hangs, before = len(self.flips("hang")), len(self.said())
        plan = {"hang": "source", "after": self.rng.randrange(2, 40)}
        started = self.start(
            faults=plan, of=self.rng.randrange(self.setup.processes), more=(f"--config.watchdog={self.watchdog} s",)
        )
        wait_until(lambda: len(self.flips("hang")) > hangs or ended(started), self.longest)
        if len(self.flips("hang")) == hangs:
            self.count["too late for a hang"] += 1
            return started, set()
        if not wait_until(lambda: ended(started), self.longest):
            raise Lost("a source that hangs does not end the process")
        if "Timeout (" not in self.said()[before:]:
            raise Wrong(f"a source hangs, and no message says so: {self.said()[before:][-2000:]}")
        self.count["hangs ended"] += 1
        return started, {1}

    def said(self) -> str:
        """What the processes of the run have logged."""
        return "".join(log.read_text() for log in self.logs if log.exists())

    def flips(self, what: str) -> list[str]:
        """The lines of what bad hardware has done that begin with `what`."""
        lines = self.faults.read_text().splitlines() if self.faults.exists() else []
        return [line for line in lines if line.startswith(what)]

    # What happens to files between two processes.

    def damage(self) -> None:
        """A bit of the latest checkpoint flips, or a file of it is cut short or removed, if there is one before it.

        Not of a run that is done: nothing trains it again, and `evaluate` refuses its checkpoint.
        """
        if len(self.checkpoints()) < 2 or (self.workdir / "result.json").exists():
            return
        file = self.rng.choice([f for f in self.checkpoints()[-1].rglob("*") if f.is_file() and f.stat().st_size])
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

    def shift_times(self) -> None:
        for file in self.workdir.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                os.utime(file, (self.rng.uniform(0, 4e9),) * 2)
        self.count["times of files moved"] += 1

    def play(self) -> None:
        """Disturbs processes, some of them and their files, until the run ends."""
        for _ in range(self.rng.randrange(3, 8)):
            self.count["processes"] += self.setup.processes
            self.happen()
            for change in (self.damage, self.tear, self.shift_times):
                if self.rng.random() < 0.25:
                    change()
        statuses = [process.wait(2 * self.longest) for process in self.start()]
        if any(statuses):
            raise Lost(f"the last processes ended with {statuses}")
        self.check()

    def happen(self) -> None:
        """Starts the processes of the run, and something happens to them."""
        alone, hardware = (self.fill_disk, self.second_run, self.read), (self.flip,) + (self.hang,) * self.setup.streams
        others = (self.stop_one,) * 2 if self.setup.processes > 1 else alone
        happening = self.rng.choice((*(self.kill,) * 2, *(self.ask,) * 2, self.pause, *others, *hardware))
        started: list[subprocess.Popen] = []
        try:
            if happening in hardware:
                started, allowed = happening()
            else:
                started = self.start()
                allowed = happening(started)
            if not allowed and self.rng.random() < 0.5:
                for process in started:
                    process.kill()
                allowed = {-signal.SIGKILL}
            if not wait_until(lambda: ended(started), self.longest):
                raise Lost(f"{happening.__name__}: the processes do not end")
        finally:
            for process in started:
                process.kill()
                process.wait()
        self.count[happening.__name__.replace("_", " ")] += 1
        statuses = {process.returncode for process in started}
        if not statuses <= {0, *allowed}:
            raise Wrong(f"{happening.__name__}: status {statuses}")

    def leave_alone(self) -> None:
        """A healthy run, with a seed of its own, that compares more steps."""
        more = (
            f"--config.seed={self.rng.randrange(1, 10**6)}",
            f"--config.check_every={self.rng.choice((7, 20))} steps",
        )
        statuses = [process.wait(4 * self.longest) for process in self.start(more=more)]
        if any(statuses):
            raise Lost(f"healthy processes ended with {statuses}")
        self.check()
        self.count["steps compared in healthy runs"] += self.logs[0].read_text().count("every bit is the same")

    def check(self) -> None:
        """Looks for false alarms, and for what no log may have."""
        if any("Traceback" in log.read_text() for log in self.logs):
            raise Wrong("a traceback")
        if self.said().count("gives other bits") > len(self.flips("flip")):
            raise FalseAlarm("corruption is reported that there was not")
        if missed := self.flips("missed"):
            raise Lost(f"a flipped bit {missed[0]}")


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
    """A file system of 30 MB at `place`; without the right to mount one, a folder, whose disk is not filled."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        Round.fill_disk = Round.kill  # type: ignore[method-assign]
    try:
        yield place
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)
        shutil.rmtree(place, ignore_errors=True)


def whole(folder: Path, setup: Setup, seed: int) -> tuple[object, float]:
    """The outcome of the run by `setup` that is left alone, and the seconds it took.

    It is trained once in `folder`.
    """
    one = Round(folder / f"whole{SETUPS.index(setup)}", setup, random.Random(seed), collections.Counter())
    one.workdir = one.folder / "run"
    if not (one.workdir / "result.json").exists():
        one.folder.mkdir()
        statuses = [process.wait() for process in one.start()]
        if any(statuses):
            raise SystemExit("".join(log.read_text() for log in one.logs))
        one.check()
        records = outcome(one.workdir)
        print(f"left alone ({setup.name}): {records[0][:8]}, {len(records[1])} records", flush=True)
    times = json.loads((one.workdir / "result.json").read_text())["time"]
    return outcome(one.workdir), sum(part["seconds"] for part in times)


def disturb(seconds: float, seed: int, folder: Path, setups: tuple[Setup, ...] = SETUPS) -> int:
    """Rounds until the time is over; prints what happened; the number of rounds that went wrong."""
    began, count, faults, number = time.monotonic(), collections.Counter[str](), collections.Counter[str](), 0
    while time.monotonic() - began < seconds:
        rng = random.Random(f"{seed}/{number}")
        setup, alone = setups[number % len(setups)], rng.random() < 0.15
        expected, took = whole(folder, setup, seed)
        with small_disk(folder / f"round{number}") as place:
            one = Round(place, setup, rng, count, max(1.0, took / USUAL))
            try:
                one.leave_alone() if alone else one.play()
                if not alone and outcome(one.workdir) != expected:
                    raise Wrong("the parameters or the records are others")
                count["rounds left alone" if alone else "rounds equal"] += 1
            except (Wrong, subprocess.TimeoutExpired) as e:
                kind = e.kind if isinstance(e, Wrong) else "lost"
                faults[kind] += 1
                kept = folder / f"wrong{number}"
                shutil.copytree(place, kept)
                print(f"round {number} ({setup.name}) {kind.upper()}, kept in {kept}: {e}", flush=True)
        number += 1
        print(f"{time.monotonic() - began:.0f} s, round {number}: {dict(count)}", flush=True)
    verdict = ", ".join(f"{faults[kind]} {kind}" for kind in ("lost", "wrong", "false alarms"))
    print(f"{number} rounds in {time.monotonic() - began:.0f} s: {verdict}; {dict(sorted(count.items()))}")
    return faults.total()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the plan")
    parser.add_argument("--memory", action="store_true", help="watch one long run instead")
    args = parser.parse_args()
    obey_signals()
    folder = Path(tempfile.mkdtemp(prefix="stress"))
    print(f"in {folder}", flush=True)
    return watch_memory(args.seconds, folder) if args.memory else min(1, disturb(args.seconds, args.seed, folder))


if __name__ == "__main__":
    sys.exit(main())

"""Disturbs training runs by a seeded plan, and checks that each ends like one that was left alone.

    uv run python tests/stress.py --seconds 3600            # kills, signals, full disks, flipped bytes, bad batches
    uv run python tests/stress.py --seconds 3600 --memory   # one long run, whose memory must not grow

Each round is one run in a work directory of its own. Its processes are disturbed one after the other until it ends.
Then its parameters, records and results must be those of the undisturbed run. Exit status 1 if any differs, if a
process ends with a status or a message that it must not have, or if memory grows.
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from resume_check import ROOT, obey_signals, outcome
from stress_memory import watch_memory

RUN = ("--config.total=900 steps", "--config.checkpoint_every=25 steps", "--config.log_every=10 steps",
       "--config.eval_every=90 steps", "--config.checkpoint.best=test/accuracy",
       # Three batches are poisoned, and every 60th step is computed twice: a healthy machine raises no alarm.
       "--config.augment=pad_crop(2)|normalize|poisoned:poison(((3, 1), (900, 20), (41, 55)))",
       "--config.on_bad_step=skip", "--config.check_every=60 steps", "--config.watchdog=10 min")  # fmt: skip
NAMES = ("plain", "lr=[0.1]", "a b", "é漢", "x*y?")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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


class Round:
    """One run: `rng` decides what happens to its processes. `count` counts what did."""

    def __init__(self, folder: Path, rng: random.Random, count: collections.Counter):
        self.rng, self.count, self.folder = rng, count, folder
        self.workdir = folder / rng.choice(NAMES)
        self.log = folder / "log"
        self.overrides = [*RUN, f"--config.data.placement={rng.choice(('host', 'device'))}",
                          f"--config.steps_per_call={rng.choice((0, 1, 7))}"]  # fmt: skip

    def start(self, command: str = "train", log: Path | None = None) -> subprocess.Popen:
        """A process in a group of its own, sometimes under another clock."""
        words = [str(ROOT / "launch.py"), command, f"--workdir={self.workdir}"]
        words += self.overrides if command == "train" else []
        start = [sys.executable]
        if self.rng.random() < 0.2:
            self.count["clock moved"] += 1
            start += ["-c", SHIFTED.format(root=str(ROOT)), str(self.rng.uniform(-1e8, 1e8))]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        with (log or self.log).open("a") as file:
            return subprocess.Popen([*start, *words], stdout=file, stderr=file, cwd=ROOT, env=environment,
                                    start_new_session=True)  # fmt: skip

    def sleep(self, process: subprocess.Popen, longest: float) -> None:
        """Until a random moment: in start-up, or some time after a record was written."""
        if self.rng.random() < 0.6:
            before = self.size()
            while process.poll() is None and self.size() <= before:
                time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.rng.uniform(0, longest))

    def size(self) -> int:
        file = self.workdir / "metrics.jsonl"
        return file.stat().st_size if file.exists() else 0

    def checkpoints(self) -> list[Path]:
        folder = self.workdir / "checkpoints"
        steps = [d for d in folder.iterdir() if d.name.isdigit()] if folder.exists() else []
        return sorted(steps, key=lambda d: int(d.name))

    # What happens to a process. Each gives the statuses that it may end with.

    def kill(self, process: subprocess.Popen) -> set[int]:
        self.sleep(process, 4)
        process.kill()
        return {-signal.SIGKILL}

    def ask(self, process: subprocess.Popen) -> set[int]:
        """A signal to the process or to its group, once or twice."""
        self.sleep(process, 4)
        number, group = self.rng.choice(SIGNALS), self.rng.random() < 0.5
        for _ in range(self.rng.choice((1, 2))):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number) if group else process.send_signal(number)
            time.sleep(0.05)
        self.count[number.name] += 1
        # Before Python runs the first line of launch.py the operating system's own end is what happens.
        return {75, 128 + number, -number}

    def fill_disk(self, process: subprocess.Popen) -> set[int]:
        """All space of the file system is taken for a while; the process may stop, and says why."""
        self.sleep(process, 2)
        ballast = self.folder / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.rng.uniform(0.5, 5))
        ballast.unlink()
        process.kill() if self.rng.random() < 0.5 else None
        return {1, -signal.SIGKILL}

    def second_run(self, process: subprocess.Popen) -> set[int]:
        """One of the two is refused, and the other one does not notice: the first, unless it had not begun."""
        self.sleep(process, 1)
        log = self.folder / "second.log"
        log.unlink(missing_ok=True)
        status = self.start(log=log).wait()
        refused = status == 1 and "is in use by another" in log.read_text()
        if status and not refused:
            raise Wrong(f"a second run ended with {status}: {log.read_text()}")
        self.count["second run refused"] += refused
        return set() if refused else {1}

    def read(self, process: subprocess.Popen) -> set[int]:
        """`evaluate` beside the run."""
        self.sleep(process, 1)
        log = self.folder / "reader.log"
        log.unlink(missing_ok=True)
        before = bool(self.checkpoints())
        status = self.start("evaluate", log=log).wait()
        text = log.read_text()
        if "Traceback" in text or (status and before):
            raise Wrong(f"evaluate ended with {status}: {text}")
        self.count["evaluated beside the run"] += status == 0
        return set()

    # What happens to files between two processes.

    def damage(self) -> None:
        """A bit of the latest checkpoint flips, or a file of it is cut short or removed, if there is one before it."""
        if len(self.checkpoints()) < 2:
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
            others = (self.fill_disk, self.second_run, self.read)
            happening = self.rng.choice((*(self.kill,) * 2, *(self.ask,) * 3, *others))
            process = self.start()
            self.count["processes"] += 1
            try:
                allowed = happening(process)
                if not allowed and self.rng.random() < 0.5:
                    process.kill()
                    allowed = {-signal.SIGKILL}
                status = process.wait(120)
            except BaseException:
                process.kill()
                raise
            self.count[happening.__name__.replace("_", " ")] += 1
            if status not in {0, *allowed}:
                raise Wrong(f"{happening.__name__}: status {status}")
            for change in (self.damage, self.tear, self.shift_times):
                if self.rng.random() < 0.25:
                    change()
        if status := self.start().wait():
            raise Wrong(f"the last process ended with {status}")
        if "Traceback" in self.log.read_text():
            raise Wrong("a traceback")


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


def skipped(workdir: Path) -> list[str]:
    """The lines of the steps that the run skipped."""
    return (workdir / "skipped.jsonl").read_text().splitlines()


def disturb(seconds: float, seed: int, folder: Path) -> int:
    """Rounds until the time is over; prints what happened; the number of rounds that went wrong."""
    began, count, wrong = time.monotonic(), collections.Counter[str](), 0
    whole = Round(folder, random.Random(seed), count)
    whole.workdir = folder / "whole"
    if whole.start().wait():
        raise SystemExit(whole.log.read_text())
    expected = outcome(whole.workdir)
    print(
        f"left alone: {expected[0]}, {len(expected[1])} records, {len(skipped(whole.workdir))} steps skipped",
        flush=True,
    )
    number = 0
    while time.monotonic() - began < seconds:
        with small_disk(folder / f"round{number}") as place:
            one = Round(place, random.Random(f"{seed}/{number}"), count)
            try:
                one.play()
                if outcome(one.workdir) != expected or skipped(one.workdir) != skipped(whole.workdir):
                    raise Wrong("the parameters, the records or the skipped steps are others")
                if (one.workdir / "corruption.jsonl").exists():
                    raise Wrong("a healthy step gave a false alarm of silent data corruption")
                count["rounds equal"] += 1
            except Wrong as e:
                wrong += 1
                kept = folder / f"wrong{number}"
                shutil.copytree(place, kept)
                print(f"round {number} WRONG, kept in {kept}: {e}", flush=True)
        number += 1
        print(f"{time.monotonic() - began:.0f} s, round {number}: {dict(count)}", flush=True)
    print(f"{number} rounds, {wrong} wrong; {dict(count)}")
    return wrong


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

"""Watches the memory of one long run: `uv run python tests/stress.py --seconds 3600 --memory`.

Memory in use is asked for at rest: after a save, when it is on disk, garbage is collected and input is read ahead to
the full. Else it varies by what is on its way, which depends on other work on the machine. A leak makes it grow from
each reading to the next one. What grows now and then, and to a bound, is no leak:

- TensorStore keeps a context of its compressor, 3.7 MB for `digits`, for each thread that has compressed an array
  within a minute.
- Python's table of interned strings doubles after some 650 saves of `digits`, from 8 to 15 MB: to look a path up
  interns its parts, and the places of those that are gone are used again only when the table is built anew.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from resume_check import ROOT

JUMP = 0.3  # MB; what grows by more between two readings is counted apart
LEAK = np.array([0.001, 0.001])  # MB and millions of Python's blocks a save: TensorStore's, see docs/reliability.md
MAX = 80.0  # MB that all jumps together may come to: the table, and a context for each of some twenty threads

# The command, which says in a file at rest: seconds, saves, MB that its allocator has given out, Python's blocks.
WATCHED = """
import ctypes, gc, runpy, sys, time

sys.argv, (place, every) = sys.argv[3:], sys.argv[1:3]
sys.path[0] = {root!r}
from imgclf_jax.run import environment

environment.prepare(deterministic=False)
from imgclf_jax.run.checkpoint import Checkpoints

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks".split()
                + ["fordblks", "keepcost"]]

ask = ctypes.CDLL(None).mallinfo2
ask.restype = Info
save, began, file = Checkpoints.save, time.monotonic(), open(place, "w", buffering=1)
saves, last = 0, began

def watched(self, *args, **named):
    global saves, last
    save(self, *args, **named)
    saves += 1
    if time.monotonic() - last > float(every):
        self.wait()
        time.sleep(0.5)
        gc.collect()
        info, last = ask(), time.monotonic()
        used = (info.uordblks + info.hblkhd) / 1e6
        print(last - began, saves, used, sys.getallocatedblocks(), file=file)

Checkpoints.save = watched
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def watch_memory(seconds: float, folder: Path) -> int:
    """One long run; prints memory, threads and open files with their slopes an hour; 1 if memory is lost, else 0.

    Memory that the process has of the system can grow where nothing is lost: with other work beside it, threads meet
    differently, and the allocator keeps more. What counts is memory in use at rest.
    """
    words = [str(ROOT / "launch.py"), f"--workdir={folder / 'long'}", "--config.total=1000000000 steps"]
    at_rest = folder / "at_rest"
    start = [sys.executable, "-c", WATCHED.format(root=str(ROOT)), str(at_rest), str(max(2.0, seconds / 80))]
    # What each thread keeps of what it has freed would count as in use.
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*start, *words], stdout=log, stderr=log, cwd=ROOT, env=environment)
    began, rows = time.monotonic(), []
    try:
        while (now := time.monotonic() - began) < seconds:
            time.sleep(min(5.0, seconds / 100))
            if process.poll() is not None:
                raise SystemExit((folder / "log").read_text())
            seen = psutil.Process(process.pid)
            rows.append((now, seen.memory_info().rss / 1e6, seen.num_threads(), seen.num_fds()))
    finally:
        process.terminate()
        process.wait()
    for part, begin in (("but for the start", 1 / 6), ("the last half", 1 / 2)):
        print(f"{part}:")
        for name, values in zip(("memory, MB", "threads", "open files"), np.array(rows)[:, 1:].T, strict=True):
            first, last, slope, error = _slope(np.array(rows)[:, 0] / 3600, values, begin)
            print(f"  {name}: {first:.1f} at first, {last:.1f} at last, {slope:+.2f} (± {error:.2f}) an hour")
    steps = json.loads((folder / "long" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    print(f"{steps} steps in {seconds:.0f} s")
    return judge(np.loadtxt(at_rest, ndmin=2), seconds / 6)


def judge(rows: np.ndarray, start: float) -> int:
    """1 if memory is lost, by the rows at rest after `start` seconds: (seconds, saves, MB in use, Python's blocks)."""
    rows = rows[rows[:, 0] > start]
    if len(rows) < 10:
        raise SystemExit(f"{len(rows)} readings are too few to tell; let it run longer")
    hours, saves, used, blocks = rows[:, 0] / 3600, *rows[:, 1:].T
    jumps, steady, error = growth(hours, used)
    _, more, more_error = growth(hours, blocks / 1e6)
    a_save = np.median(np.diff(used) / np.diff(saves)) * 1e6
    print(
        f"in use at rest, MB: {used[0]:.2f} at first, {used[-1]:.2f} at last, over {len(used)} readings and "
        f"{saves[-1] - saves[0]:.0f} saves\n"
        f"  steadily {steady:+.2f} (± {error:.2f}) an hour, {a_save:+.0f} bytes a save\n"
        f"  beside that {len(jumps)} jumps of over {JUMP} MB, {sum(jumps):+.1f} MB together: "
        f"{', '.join(f'{jump:+.1f}' for jump in jumps)}\n"
        f"  Python's blocks, which are apart: {blocks[0]:.0f} at first, {blocks[-1]:.0f} at last, "
        f"{more * 1e6:+.0f} (± {more_error * 1e6:.0f}) an hour",
        flush=True,
    )
    known = (saves[-1] - saves[0]) / (hours[-1] - hours[0]) * LEAK  # [MB, millions of blocks] an hour
    lost = steady > max(1, 3 * error) + known[0] or more > max(0.02, 3 * more_error) + known[1]
    return int(lost or sum(jumps) > MAX)


def growth(hours: np.ndarray, used: np.ndarray) -> tuple[list[float], float, float]:
    """(jumps, steady growth an hour, its standard error) of readings [n] at these hours [n].

    The steady growth is the median of the slopes between neighbouring readings. A few jumps do not move it.
    """
    steps = np.diff(used)
    slopes = steps / np.diff(hours)
    median = np.median(slopes)
    spread = 1.4826 * np.median(np.abs(slopes - median))  # the standard deviation, of a normal distribution
    return [float(j) for j in steps if abs(j) > JUMP], float(median), float(1.2533 * spread / np.sqrt(len(slopes)))


def _slope(hours: np.ndarray, values: np.ndarray, start: float) -> tuple[float, float, float, float]:
    """(first, last, slope an hour, its error) of the values after this part of the time."""
    settled = hours > hours[-1] * start
    # Means over twentieths of the time: neighbouring samples are not independent.
    x, y = ([part.mean() for part in np.array_split(v[settled], 20)] for v in (hours, values))
    fit, covariance = np.polyfit(x, y, 1, cov=True)
    return y[0], y[-1], float(fit[0]), float(np.sqrt(covariance[0, 0]))

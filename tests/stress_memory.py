"""Watches the memory of one long run: `uv run python tests/stress.py --seconds 3600 --memory`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from resume_check import ROOT

# Said by a thread of the process itself: the bytes that its allocator has given out, in megabytes.
IN_USE = """
import ctypes, os, threading, time

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks".split()
                + ["fordblks", "keepcost"]]

def say():
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Info
    while True:
        info = ask()
        temporary = os.environ["IN_USE"] + ".tmp"
        with open(temporary, "w") as file:
            file.write(str((info.uordblks + info.hblkhd) / 1e6))
        os.replace(temporary, os.environ["IN_USE"])
        time.sleep(1.0)

threading.Thread(target=say, daemon=True).start()
"""


def watch_memory(seconds: float, folder: Path) -> int:
    """One long run; prints memory, threads and open files with their slopes an hour; 1 if memory grows, else 0.

    Memory is what the process has of the system, and the part of it that is in use, by its allocator. The former can
    grow where nothing is lost: with other work beside it, threads meet differently, and the allocator keeps more.
    """
    words = [str(ROOT / "launch.py"), f"--workdir={folder / 'long'}", "--config.total=1000000000 steps"]
    (folder / "sitecustomize.py").write_text(IN_USE, encoding="utf-8")
    in_use = folder / "in_use"
    environment = {**os.environ, "PYTHONPATH": str(folder), "IN_USE": str(in_use)}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, cwd=ROOT, env=environment)
    began, rows = time.monotonic(), []
    try:
        while (now := time.monotonic() - began) < seconds:
            time.sleep(min(5.0, seconds / 100))
            if process.poll() is not None:
                raise SystemExit((folder / "log").read_text())
            seen, used = psutil.Process(process.pid), float(in_use.read_text() or "nan")
            rows.append((now, seen.memory_info().rss / 1e6, used, seen.num_threads(), seen.num_fds()))
    finally:
        process.terminate()
        process.wait()
    names = ("memory, MB", "in use, MB", "threads", "open files")
    grows = 0
    for part, start in (("but for the start", 1 / 6), ("the last half", 1 / 2)):
        print(f"{part}:")
        for name, values in zip(names, np.array(rows)[:, 1:].T, strict=True):
            first, last, slope, error = _slope(np.array(rows)[:, 0] / 3600, values, start)
            print(
                f"  {name}: {first:.1f} at first, {last:.1f} at last, {slope:+.2f} (± {error:.2f}) an hour", flush=True
            )
            grows += name.startswith("in use") and slope > 3 * error and slope > 5
    steps = json.loads((folder / "long" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    print(f"{steps} steps in {seconds:.0f} s")
    return grows


def _slope(hours: np.ndarray, values: np.ndarray, start: float) -> tuple[float, float, float, float]:
    """(first, last, slope an hour, its error) of the values after this part of the time."""
    settled = hours > hours[-1] * start
    # Means over twentieths of the time: neighbouring samples are not independent.
    x, y = ([part.mean() for part in np.array_split(v[settled], 20)] for v in (hours, values))
    fit, covariance = np.polyfit(x, y, 1, cov=True)
    return y[0], y[-1], float(fit[0]), float(np.sqrt(covariance[0, 0]))

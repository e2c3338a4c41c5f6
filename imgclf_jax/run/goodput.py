"""time.jsonl: where the time of a run went, over all the attempts to train it.

A line is {"step": 900, "first": 450, "began": …, "at": …, "seconds": {"steps": 31.2, "input": 0.4, …}}: an attempt that
began at the Unix time `began` with step `first`, and what it had done by the time `at`. A process is one attempt, or
several if it rolls back. The last line of an attempt is what counts.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from imgclf_jax.core import processes
from imgclf_jax.core.typing import JsonMapping, JsonObject
from imgclf_jax.run import writers
from imgclf_jax.run.phases import PHASES, Phases

NAME = "time.jsonl"
_EVERY = 10.0  # seconds between two lines at least, but for checkpoints and the end


class TimeRecord:
    """Writes time.jsonl in `folder` for an attempt that trains from step `first`. Process 0 alone writes."""

    def __init__(self, folder: Path, first: int, phases: Phases):
        self._first, self._phases, self._written = first, phases, 0.0
        self._path = folder / NAME
        self._file: writers.RecordFile | None = None
        if not processes.index():
            self._file = writers.RecordFile(self._path, last_of_each(writers.read_metrics(self._path)))
            self._write(first, self._file)

    def update(self, step: int, now: bool = False) -> None:
        """Appends a line, `now` or if the last one is some seconds old."""
        if self._file is not None and (now or time.monotonic() - self._written > _EVERY):
            self._written = time.monotonic()
            self._write(step, self._file)

    def _write(self, step: int, file: writers.RecordFile) -> None:
        seconds, began = self._phases.totals(), self._phases.began
        at = round(began + sum(seconds.values()), 3)
        file.write({"step": step, "first": self._first, "began": began, "at": at, "seconds": seconds})

    def summary(self) -> JsonObject:
        """`goodput` and `time`, the seconds of the run by phase, for result.json; {} except in process 0."""
        total = sum_up(writers.read_metrics(self._path)) if self._file is not None else {}
        spent = [{"phase": name, "seconds": round(seconds, 2)} for name, seconds in total.items() if seconds]
        return {"goodput": round(goodput(total), 4), "time": spent} if spent else {}

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()


def last_of_each(lines: Sequence[JsonMapping]) -> list[JsonMapping]:
    """The last well-formed line of each attempt, in the order of their first ones: a clock may have been set back."""
    return list({line["began"]: line for line in lines if _is_well_formed(line)}.values())


def _is_well_formed(line: JsonMapping) -> bool:
    first, seconds = line.get("first"), line.get("seconds")
    numbers = [line.get("began"), line.get("at"), *(seconds.values() if isinstance(seconds, dict) else [None])]
    return type(first) is int and all(type(x) in (int, float) and math.isfinite(x) for x in numbers)


def sum_up(lines: Sequence[JsonMapping]) -> dict[str, float]:
    """The seconds of a run by phase, from the first attempt's start to the last line; they add up to this time.

    `recomputed` are steps that a kill or a rollback lost, `idle` is the time between attempts, with what a killed
    process did after its last line.
    """
    runs = last_of_each(lines)
    total = dict.fromkeys((*PHASES, "recomputed", "idle"), 0.0)
    for number, run in enumerate(runs):
        for name, seconds in run["seconds"].items():
            total[name if name in total else "other"] += seconds
        if number + 1 < len(runs):
            total["idle"] += max(0.0, runs[number + 1]["began"] - run["at"])
            kept = min(later["first"] for later in runs[number + 1 :])  # a damaged checkpoint sends a run further back
            done, lost = run["step"] - run["first"], run["step"] - kept
            if done > 0 and lost > 0:
                again = run["seconds"].get("steps", 0.0) * min(1.0, lost / done)
                total["recomputed"] += again
                total["steps"] -= again
    return total


def goodput(total: JsonMapping) -> float:
    """The fraction of the wall time in which the run made progress: `steps` of the whole."""
    whole = sum(total.values())
    return float(total["steps"] / whole) if whole else 0.0

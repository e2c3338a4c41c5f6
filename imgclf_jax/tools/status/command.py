"""The command `status`: how far runs are, how they fare, and where their time goes. It reads records and starts no JAX
backend."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from imgclf_jax.core import json_files, terminal
from imgclf_jax.core.terminal import duration
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.run import goodput, lock, record, writers
from imgclf_jax.run.record import Record


class Status(NamedTuple):
    """What the files of a run say of it, as printed in JSON."""

    run: str
    state: str  # "done", "running", "stopped" or "not begun"
    step: int  # the last that is recorded
    total: int | None
    checkpoint: int | None  # the step of the latest one
    images_per_second: float | None  # at the latest log line
    seconds_left: float | None  # for a run that trains now, by its pace until now
    goodput: float | None  # the fraction of the wall time spent on training steps
    seconds: dict[str, float]  # by phase: see `goodput.sum_up`
    health: list[str]  # sentences on what went wrong


def main(files: Sequence[str], format: str) -> int:
    """Prints the status of the runs in and below the directories `files`; `format` is "table" or "json".

    Returns 1 if a run's record is damaged, else 0. Raises UserError if there is no run.
    """
    terminal.setup_logging()
    runs, damaged = record.find(files)
    found = [read(run) for run in runs]
    if format == "json":
        terminal.print_json([one._asdict() for one in found])
        return 1 if damaged else 0
    terminal.print_table(
        ["run", "state", "step", "checkpoint", "images/s", "left", "goodput"],
        [[one.run, one.state, f"{one.step}/{one.total or '?'}", _or_dash(one.checkpoint),
          _or_dash(one.images_per_second, "{:,.0f}".format), _or_dash(one.seconds_left, duration),
          "" if one.goodput is None else f"{one.goodput:.0%}"] for one in found],
    )  # fmt: skip
    if len(found) == 1 and any(found[0].seconds.values()):
        whole = sum(found[0].seconds.values())
        rows = sorted(((s, name) for name, s in found[0].seconds.items() if s > 0.0005 * whole), reverse=True)
        terminal.print_table(["time", "", "of all"], [[n, f"{s:,.1f} s", f"{s / whole:.1%}"] for s, n in rows])
    for one in found:
        for sentence in one.health:
            terminal.print_text(f"{one.run}: {sentence}")
    return 1 if damaged else 0


def read(run: Record) -> Status:
    """The status of a run. Raises UserError for a damaged file."""
    folder = run.path
    latest, lines = run.latest(), goodput.last_of_each(writers.read_metrics(folder / goodput.NAME))
    running, total, saved = lock.is_held(folder / "lock"), run.total, run.workdir.last_checkpoint()
    step = max([run.step, *(line["step"] for line in lines[-1:])])
    state = "done" if run.final else "running" if running else "stopped" if step or saved is not None else "not begun"
    left = None
    if running and lines and total and (line := lines[-1])["at"] >= lock.taken_at(folder / "lock"):
        done, spent = line["step"] - line["first"], line["at"] - line["began"] - _fixed(line["seconds"])
        if done > 0:
            left = max(0.0, (total - line["step"]) * spent / done - (time.time() - line["at"]))
    seconds = goodput.sum_up(lines)
    return Status(
        run.name, state, step, total, saved, latest.get("train/images_per_second"), left,
        goodput.goodput(seconds) if any(seconds.values()) else None,
        {name: round(value, 3) for name, value in seconds.items()}, _health(run, running, step),
    )  # fmt: skip


def _fixed(seconds: JsonObject) -> float:
    """The seconds of an attempt that do not grow with its steps."""
    return float(sum(seconds.get(name, 0.0) for name in ("import", "setup", "compile")))


def _health(run: Record, running: bool, step: int) -> list[str]:
    folder, found = run.path, []
    if skipped := sum(int(line.get("train/skipped", 0)) for line in run.metrics):
        found.append(f"{skipped} steps were skipped: their loss, gradient or parameters are not finite")
    if hung := sorted(path.name for path in folder.glob("hang-*.txt")):
        found.append(f"a process hung: see {', '.join(hung)}")
    if not (running or run.final) and step <= _bad_step(folder / "nonfinite.json"):
        found.append("a bad step stopped the run: see nonfinite.json")
    return found


def _bad_step(file: Path) -> float:
    """The step in nonfinite.json; -1 without the file."""
    found = json_files.read(file) if file.is_file() else {"step": -1}
    step = found.get("step") if isinstance(found, dict) else None
    return step if type(step) is int else math.inf


def _or_dash[T](value: T | None, form: Callable[[T], str] = str) -> str:
    return "-" if value is None else form(value)

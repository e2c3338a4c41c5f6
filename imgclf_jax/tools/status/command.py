"""The command `status`: how far runs are, and where their time goes, by their records alone: no JAX backend starts."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from imgclf_jax.core import json_files, terminal
from imgclf_jax.run import lock, record
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
    seconds: dict[str, float]  # by phase, of the process that ended the run: see `timer.PHASES`
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
        ["run", "state", "step", "checkpoint", "images/s", "left"],
        [[one.run, one.state, f"{one.step}/{one.total or '?'}", _or_dash(one.checkpoint),
          _or_dash(one.images_per_second, "{:,.0f}".format), _or_dash(one.seconds_left, _duration)] for one in found],
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
    total, saved, pace = run.total, run.workdir.last_checkpoint(), _number(run.latest().get("train/images_per_second"))
    running, begun = lock.is_held(run.path / "lock"), run.step > 0 or saved is not None
    state = "done" if run.result else "running" if running else "stopped" if begun else "not begun"
    left = None
    if running and pace and total:
        left = max(0, total - run.step) * run.config.batch_size * run.config.num_seeds / pace
    return Status(run.name, state, run.step, total, saved, pace, left, _seconds(run), _health(run, running))


def _duration(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3.5 h, 4.2 days."""
    for unit, size, limit, form in (("s", 1, 90, ".0f"), ("min", 60, 5400, ".0f"), ("h", 3600, 172_800, ".1f")):
        if seconds < limit:
            return f"{seconds / size:{form}} {unit}"
    return f"{seconds / 86400:.1f} days"


def _seconds(run: Record) -> dict[str, float]:
    phases = run.result.get("time")
    found = [one for one in phases if isinstance(one, dict)] if isinstance(phases, list) else []
    return {str(one.get("phase")): _number(one.get("seconds")) or 0.0 for one in found}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _health(run: Record, running: bool) -> list[str]:
    file, found = run.path / "nonfinite.json", []
    if skipped := sum(_number(line.get("train/skipped")) or 0.0 for line in run.metrics):
        found.append(f"{skipped:.0f} steps were skipped: their loss, gradient or parameters are not finite")
    if not (running or run.result) and file.is_file():
        step = json_files.read(file).get("step")
        if type(step) is not int or run.step <= step:
            found.append("a bad step stopped the run: see nonfinite.json")
    return found


def _or_dash[T](value: T | None, form: Callable[[T], str] = str) -> str:
    return "-" if value is None else form(value)

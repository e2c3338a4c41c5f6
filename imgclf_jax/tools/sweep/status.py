"""What a sweep says of its runs: how far they are, the time left, and their ranking."""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ml_collections import ConfigDict

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.terminal import duration
from imgclf_jax.core.text import decimals, printable
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.run.ranking import latest, main_metric
from imgclf_jax.run.workdir import Workdir

_TAIL = 1 << 16  # bytes of metrics.jsonl that are read


@dataclass(frozen=True)
class Progress:
    """How far a run is, as far as its files tell."""

    step: int = 0
    total: int | None = None  # None until it has recorded its data
    metrics: Mapping[str, float] = field(default_factory=dict)  # its latest ones

    @property
    def part(self) -> float:
        """The part of its steps that is done, 0 to 1."""
        return min(1.0, self.step / self.total) if self.total else 0.0


def read_progress(config: ConfigDict, workdir: Workdir) -> Progress:
    """How far the run in a work directory is."""
    try:
        total = workdir.total_steps(config)
    except UserError:
        return Progress()
    records = _tail(workdir.metrics)
    return Progress(records[-1]["step"] if records else 0, total, latest(records))


def _tail(file: Path) -> list[JsonObject]:
    """The last records of a file that is being written."""
    try:
        with paths.open_regular(file) as opened:
            size = opened.seek(0, 2)
            opened.seek(max(0, size - _TAIL))
            lines = opened.read().splitlines()[1 if size > _TAIL else 0 :]
    except OSError:
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(record := json.loads(line), dict) and type(record.get("step")) is int:
                records.append(record)
    return records


def format_metric(metrics: Mapping[str, float], name: str) -> str:
    """Formats a metric, with the standard deviation over the seeds of a run if it has several."""
    std = metrics.get(f"{name}_std")
    return decimals(metrics[name]) + ("" if std is None else f" ± {decimals(std)}")


def describe(runs: Sequence[tuple[str, ConfigDict, Progress]], done: int, total: int, left: float | None) -> str:
    """`2 of 6 runs done, 3 min left; step 113 of 674, test/accuracy 0.9694 (seed=2)`, for the runs that train now.

    Their names come last, since a narrow terminal cuts them off.
    """
    text = f"{done} of {total} runs done" + ("" if left is None else f", {duration(left)} left")
    for name, config, progress in runs:
        text += f"; step {progress.step:,} of {progress.total:,}" if progress.total else "; starting"
        if metric := main_metric(config.checkpoint.best, config.data.eval, progress.metrics):
            text += f", {metric[0]} {decimals(progress.metrics[metric[0]])}"
        text += f" ({printable(name)})"
    return text


def time_left(parts: float, before: float, total: int, seconds: float) -> float | None:
    """Seconds until `total` runs are done. None until a hundredth of a run was.

    `parts` of the runs are done, `before` of them at the start, `seconds` ago.
    """
    if parts - before < 0.01:
        return None
    return (total - parts) * seconds / (parts - before)


def result(workdir: Workdir) -> dict[str, float]:
    """The metrics in result.json by their names, such as "test/accuracy"; {} without a result."""
    return {
        f"{name}/{key}": value
        for name, group in workdir.read_result().items()
        if isinstance(group, dict)
        for key, value in group.items()
        if type(value) in (int, float)
    }


_DETAILS = 48  # columns for a run's outcome, time and metric
_RANKED = 10  # most runs in a ranking


def row(name: str, width: int, details: str, columns: int | None) -> list[str]:
    """A run's line, with its name in a column of `width`; two lines if a terminal of `columns` is too narrow."""
    if columns is not None and width + 2 + _DETAILS > columns:
        return [name, f"    {details}"]
    return [f"{name:<{width}}  {details}"]


def ranking(runs: Iterable[tuple[str, ConfigDict, Mapping[str, float]]], columns: int | None = None) -> list[str]:
    """Lines that rank finished runs by their main metric, the best first; [] unless two or more share a metric.

    On a terminal of `columns` that is too narrow for a name and its metric, the metric has a line of its own.
    """
    ranked = [(metric[1] * metrics[metric[0]], metric[0], name, metrics) for name, config, metrics in runs
              if (metric := main_metric(config.checkpoint.best, config.data.eval, metrics))]  # fmt: skip
    ranked = [one for one in ranked if math.isfinite(one[0]) and one[1] == ranked[0][1]]
    if len(ranked) < 2:
        return []
    ranked.sort(key=lambda one: -one[0])
    key, width = ranked[0][1], max(len(one[2]) for one in ranked[:_RANKED])
    lines = [f"ranking by {key}:"]
    between = "  " if columns is None or width + 26 <= columns else "\n      "
    for place, (_, _, name, metrics) in enumerate(ranked[:_RANKED], 1):
        row = f"{place:>4}  {name:<{width}}{between}{format_metric(metrics, key)}"
        lines += [line.rstrip() for line in row.split("\n")]
    return lines + ([f"      and {len(ranked) - _RANKED} more"] if len(ranked) > _RANKED else [])

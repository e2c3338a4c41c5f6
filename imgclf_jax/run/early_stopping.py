"""Early stopping: ends a run once a metric stops improving, as a pure function of its recorded metrics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax import metrics
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.run import writers
from imgclf_jax.run.cadences import Cadences


@dataclass(frozen=True)
class EarlyStopping:
    """Ends a run at the first evaluation `patience` steps or more after the best one.

    The best value is the greatest of `sign` times the metric. Neither an equal value nor a nonfinite one improves it.
    """

    metric: str  # for example "val/loss"
    sign: float
    patience: int  # in steps
    text: str  # of the config

    def reason(self, values: Sequence[tuple[int, float]]) -> str:
        """Returns why the run ends at the last of `values`, (step, value) in order; "" if training continues."""
        best, best_step = -math.inf, 0
        for step, value in values:
            if math.isfinite(value) and self.sign * value > best:
                best, best_step = self.sign * value, step
        if not values or values[-1][0] - best_step < self.patience:
            return ""
        waited = values[-1][0] - best_step
        if math.isinf(best):
            return f"{self.metric} was never finite in {waited} steps (stop={self.text!r})"
        return f"{self.metric} has not improved for {waited} steps: best {self.sign * best:.4g} at step {best_step}"


class Stopper:
    """Early stopping for a run that continues from step `start` in `folder`. All processes call the methods.

    Raises UserError if metrics.jsonl lacks an evaluation that the decision depends on.
    """

    def __init__(self, early: EarlyStopping | None, cadences: Cadences, folder: Path, start: int):
        self._early, self._total = early, cadences.total
        self._values: list[tuple[int, float]] = []
        if early:
            due = cadences.evaluations(start)
            found = processes.broadcast_from_process_0(
                "reading metrics.jsonl", lambda: _read(early, folder, due, start)
            )
            self._values = [(int(step), value) for step, value in found]

    def note(self, step: int, scores: Mapping[str, float]) -> None:
        """Adds an evaluation."""
        if self._early:
            self._values.append((step, scores[self._early.metric]))

    def reason(self, step: int) -> str:
        """Returns why the run ends early at `step`; "" if training continues. Process 0 decides for all."""
        if not (early := self._early) or step >= self._total:
            return ""
        return str(processes.broadcast_from_process_0("early stopping", lambda: early.reason(self._values)))


def _read(early: EarlyStopping, folder: Path, due: Sequence[int], start: int) -> list[tuple[int, float]]:
    """Returns (step, value) for the evaluations `due` up to step `start`, whose own may not have run yet.

    Raises UserError if an earlier one is missing, since the run may have ended there.
    """
    file = folder / "metrics.jsonl"
    records = writers.read_metrics(file)
    found = {record["step"]: record[early.metric] for record in records if early.metric in record}
    if missing := [step for step in due if step not in found and step < start]:
        raise UserError(f"{file} has no {early.metric} of step {missing[0]}, by which stop={early.text!r} ends the "
                        "run; restore the file, or pass another --workdir")  # fmt: skip
    return [(step, _number(found[step])) for step in due if step in found]


def build(config: ConfigDict, patience: int | None) -> EarlyStopping | None:
    """Builds the early stopping of a config, if any. Raises UserError for a metric of unknown direction."""
    if patience is None:
        return None
    metric, sign = metrics.parse_best(configs.split_stop(config.stop)[0], key="stop")
    return EarlyStopping(metric, sign, patience, config.stop)


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) else math.nan

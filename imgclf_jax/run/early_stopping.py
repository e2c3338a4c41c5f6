"""Early stopping: a run ends once a metric has not improved for a while. It follows from the recorded metrics alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax import metrics
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import JsonMapping
from imgclf_jax.run import writers
from imgclf_jax.run.cadences import Cadences
from imgclf_jax.run.skipped import read_left_out


@dataclass(frozen=True)
class EarlyStopping:
    """Ends a run at the first evaluation `patience` steps or more after the best one.

    The greatest value of `sign` times the metric is best, and an equal value is no improvement. A value that is not
    finite is no improvement either.
    """

    metric: str  # such as "val/loss"
    sign: float
    patience: Fraction  # in steps
    text: str  # of the config

    def reason(self, values: Sequence[tuple[int, float]]) -> str:
        """Says why the run ends with the last of its evaluations, (step, value) in order; "" if it goes on."""
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

    def recorded(
        self, records: Iterable[JsonMapping], due: Iterable[int], start: int, where: str
    ) -> list[tuple[int, float]]:
        """The values in `records` of the evaluations `due` up to the step `start`, whose own may be yet to come.

        Raises UserError if another one is missing, since the run may have ended at it.
        """
        found = {record["step"]: record[self.metric] for record in records if self.metric in record}
        if missing := [step for step in due if step not in found and step < start]:
            raise UserError(f"{where} has no {self.metric} of step {missing[0]}, by which stop={self.text!r} ends the "
                            "run; restore the file, or pass another --workdir")  # fmt: skip
        return [(step, _number(found[step])) for step in due if step in found]


class Stopper:
    """The early stopping of a run that goes on from step `start` in `folder`. All processes call the methods.

    Raises UserError if an evaluation that it depends on is not recorded.
    """

    def __init__(self, early: EarlyStopping | None, cadences: Cadences, folder: Path, start: int):
        self._early, self._total = early, cadences.total
        self._values: list[tuple[int, float]] = []
        if early:
            left_out = read_left_out(folder)
            due = [step for step in cadences.evaluations(start)
                   if not any(first < step <= until for first, until in left_out)]  # fmt: skip
            file = folder / "metrics.jsonl"
            found = processes.broadcast_from_process_0(
                "reading metrics.jsonl", lambda: early.recorded(writers.read_metrics(file), due, start, str(file))
            )
            self._values = [(int(step), value) for step, value in found]

    def note(self, step: int, scores: Mapping[str, float]) -> None:
        """Takes an evaluation into account."""
        if self._early:
            self._values.append((step, scores[self._early.metric]))

    def reason(self, step: int) -> str:
        """Why the run ends at `step`, before its total; "" if it goes on. Process 0 decides."""
        if not (early := self._early) or step >= self._total:
            return ""
        return str(processes.broadcast_from_process_0("early stopping", lambda: early.reason(self._values)))


def build(config: ConfigDict, patience: Fraction | None) -> EarlyStopping | None:
    """The early stopping of a config; None without it. Raises UserError for a metric of unknown direction."""
    if patience is None:
        return None
    metric, sign = metrics.parse_best(configs.split_stop(config.stop)[0], key="stop")
    return EarlyStopping(metric, sign, patience, config.stop)


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) else math.nan

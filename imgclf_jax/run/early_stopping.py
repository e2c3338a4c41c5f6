"""Early stopping: ends a run once a metric stops improving, as a pure function of its recorded metrics."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from imgclf_jax import config as configs
from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.run import writers
from imgclf_jax.run.cadences import Cadences
from imgclf_jax.run.ranking import find_best, parse_best, values_of


@dataclass(frozen=True)
class EarlyStopping:
    """Ends a run at the first evaluation `patience` steps or more after the best one: see `ranking.find_best`."""

    metric: str  # for example "val/loss"
    sign: float
    patience: int  # in steps
    text: str  # of the config

    def reason(self, values: Sequence[tuple[int, float]]) -> str:
        """Returns why the run ends at the last of `values`, (step, value) in order; "" if training continues."""
        best = find_best(values, self.sign)
        waited = values[-1][0] - (best[0] if best else 0) if values else 0
        if not values or waited < self.patience:
            return ""
        if best is None:
            return f"{self.metric} was never finite in {waited} steps (stop={self.text!r})"
        return f"{self.metric} has not improved for {waited} steps: best {best[1]:.4g} at step {best[0]}"


def build(text: str, every: Fraction | None, steps: Callable[[str], int]) -> EarlyStopping | None:
    """The early stopping of the key `stop`, if any, of a run with an evaluation every `every` steps.

    Its patience spans whole evaluations, at least one. With a fractional period they are that many steps apart, rounded
    up or down, so the patience is rounded down. `steps` maps its duration to steps.
    """
    if not text or every is None:
        return None
    metric, patience = configs.split_stop(text)
    evaluations = (steps(patience) - 1) // every + 1
    return EarlyStopping(*parse_best(metric, key="stop"), max(1, math.floor(evaluations * every)), text)


def find_reason(early: EarlyStopping | None, cadences: Cadences, folder: Path, step: int) -> str:
    """Returns why the run in `folder` ends early at `step`, whose own evaluation may not have run; "" if it trains on.

    All processes call this. Raises UserError if metrics.jsonl lacks an earlier evaluation, where it may have ended.
    """
    if early is None or step >= cadences.total:
        return ""

    def find() -> str:
        file = folder / "metrics.jsonl"
        values = values_of(writers.read_metrics(file), early.metric)
        due = [one for one in cadences.evaluations(step) if one < step]
        if missing := sorted(set(due) - {at for at, _ in values}):
            raise UserError(f"{file} has no {early.metric} of step {missing[0]}, by which stop={early.text!r} ends the "
                            "run; restore the file, or pass another --workdir")  # fmt: skip
        return early.reason([one for one in values if one[0] <= step])

    return str(processes.broadcast(find))

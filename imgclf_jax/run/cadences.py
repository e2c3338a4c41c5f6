"""When a run logs, evaluates and saves, and the steps it trains."""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple


def _is_due(step: int, every: Fraction | None) -> bool:
    """Whether an event of period `every` falls on `step`: whether ceil(k * every) == step for a whole k ≥ 1."""
    return every is not None and step // every > (step - 1) // every


class Due(NamedTuple):
    """What to do after a step."""

    log: bool
    eval: bool
    checkpoint: bool


@dataclass(frozen=True)
class Cadences:
    """The periods of logging, evaluation and saving, in steps; None: at the end only. See `config.period`."""

    total: int  # steps of the run; everything is due after the last one
    log: Fraction | None
    eval: Fraction | None
    checkpoint: Fraction | None
    end: int | None = field(default=None, kw_only=True)  # training ends after so many steps; None: after `total`
    check: Fraction | None = field(default=None, kw_only=True)  # the period of steps that are computed twice

    def due(self, step: int) -> Due:
        """What to do after `step` steps."""
        periods = self.log, self.eval, self.checkpoint
        return Due(*(step == self.total or _is_due(step, every) for every in periods))

    def checks(self, step: int) -> bool:
        """Whether step `step` is computed twice."""
        return _is_due(step + 1, self.check)

    def evaluations(self, until: int) -> list[int]:
        """The steps up to `until` after which the run evaluates."""
        if self.eval is None:
            return []
        steps = {min(math.ceil(k * self.eval), self.total) for k in range(1, until // self.eval + 1)}
        return sorted(steps | ({self.total} if until >= self.total else set()))

    @property
    def last(self) -> int:
        """The number of steps to train."""
        return self.total if self.end is None else min(self.end, self.total)

"""When a run logs, evaluates and saves, and the ranges of steps in between."""

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from imgclf_jax import config as configs


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
        return Due(*(step == self.total or configs.is_due(step, every) for every in self._periods))

    def checks(self, steps: range) -> bool:
        """Whether `steps` are one step, which is computed twice."""
        return len(steps) == 1 and configs.is_due(steps.stop, self.check)

    def ranges(self, start: int, size: int, edges: Iterable[int] = ()) -> Iterator[range]:
        """Yields the steps from `start` to the end in consecutive ranges of at most `size` steps.

        A range ends where something is due, and at each of the `edges`. A step that is computed twice is a range of its
        own.
        """
        edges, end = sorted(edges), self.last
        while start < end:
            due = min(end, *(configs.next_due(start, every, self.total) for every in self._periods))
            due = min([due, *edges[(i := bisect.bisect_right(edges, start)) : i + 1]])
            if self.check is not None:
                checked = configs.next_due(start, self.check, self.total)
                due = min(due, checked - 1 if checked - 1 > start else checked)
            count = -(-(due - start) // size)  # ranges until then, with lengths that differ by at most one step
            stop = start - (start - due) // count
            yield range(start, stop)
            start = stop

    def evaluations(self, until: int) -> list[int]:
        """The steps up to `until` after which the run evaluates."""
        steps, step = [], 0
        while self.eval is not None and (step := configs.next_due(step, self.eval, self.total)) <= until:
            steps.append(step)
            if step == self.total:
                break
        return steps

    @property
    def last(self) -> int:
        """The number of steps to train."""
        return self.total if self.end is None else min(self.end, self.total)

    @property
    def _periods(self) -> tuple[Fraction | None, ...]:
        return (self.log, self.eval, self.checkpoint)

"""How often a run logs, evaluates and saves, and the ranges of steps between."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from imgclf_jax import config as configs


class Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    eval: bool
    checkpoint: bool


@dataclass(frozen=True)
class Cadences:
    """The periods, in steps, of what a run does beside training; None for at the end only. See `config.period`."""

    total: int  # steps of the run, after the last of which everything is due
    log: Fraction | None
    eval: Fraction | None
    checkpoint: Fraction | None
    end: int | None = field(default=None, kw_only=True)  # training ends after so many steps; None: after `total`

    def due(self, step: int) -> Due:
        """What is to be done when `step` steps are done."""
        return Due(*(step == self.total or configs.is_due(step, every) for every in self._periods))

    def ranges(self, start: int, size: int, edges: Iterable[int] = ()) -> Iterator[range]:
        """The steps from `start` to the end in ranges of at most `size`, one after the other.

        A range ends where something is due, and at each of the `edges`. They are made one by one as they are asked
        for, since a run may have billions of steps.
        """
        edges, end = sorted(edges), self.last
        while start < end:
            due = min(end, *(configs.next_due(start, every, self.total) for every in self._periods))
            due = min([due, *(edge for edge in edges if edge > start)])
            count = -(-(due - start) // size)  # ranges until then, whose lengths differ by a step at most
            stop = start - (start - due) // count
            yield range(start, stop)
            start = stop

    @property
    def last(self) -> int:
        """The number of steps that are trained."""
        return self.total if self.end is None else min(self.end, self.total)

    @property
    def _periods(self) -> tuple[Fraction | None, ...]:
        return (self.log, self.eval, self.checkpoint)

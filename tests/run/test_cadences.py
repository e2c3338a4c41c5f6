"""What is due after a step, and the ranges of steps between."""

import itertools
import tracemalloc

import pytest

from imgclf_jax import config as configs
from imgclf_jax.run.cadences import Cadences


@pytest.mark.parametrize("periods", [("5 steps", "7 steps", ""), ("0.3 epochs", "1 epochs", "40%"), ("", "", "")])
def test_ranges_cover_every_step_once_and_end_where_something_is_due(periods):
    cadences = Cadences(90, *(configs.period(p, "log_every", 1437, 64, 90) for p in periods))
    for start in (0, 1, 13, 89):
        ranges = list(cadences.ranges(start, 8, (27, 20)))
        assert [step for steps in ranges for step in steps] == list(range(start, 90))
        assert all(1 <= len(steps) <= 8 for steps in ranges)
        ends = {steps.stop for steps in ranges}
        due = {step for step in range(start + 1, 91) if any(cadences.due(step))}
        assert due | {s for s in (20, 27, 90) if s > start} <= ends


def test_what_is_due():
    cadences = Cadences(10, *(configs.period(p, "log_every", 64, 16, 10) for p in ("2 steps", "3 steps", "")))
    assert [step for step in range(1, 11) if cadences.due(step).log] == [2, 4, 6, 8, 10]
    assert [step for step in range(1, 11) if cadences.due(step).eval] == [3, 6, 9, 10]  # and after the last step
    assert [step for step in range(1, 11) if cadences.due(step).checkpoint] == [10]


def test_ranges_of_billions_of_steps_are_made_one_by_one():
    tracemalloc.start()
    few = list(itertools.islice(Cadences(3_000_000_000, None, None, None).ranges(7, 32), 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [step for steps in few for step in steps] == list(range(7, few[-1].stop))
    assert all(31 <= len(steps) <= 32 for steps in few)
    assert peak < 1 << 20


def test_next_due_is_the_next_step_that_is_due():
    for text in ("1 steps", "3 steps", "0.37 epochs", "0.01 epochs", "33%"):
        every = configs.period(text, "log_every", 100, 10, 60)
        due = [step for step in range(1, 61) if configs.is_due(step, every)]
        for step in range(60):
            assert configs.next_due(step, every, 60) == next((d for d in due if d > step), 60)
    assert configs.next_due(5, None, 60) == 60

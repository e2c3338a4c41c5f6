"""What is due after a step, and the ranges of steps in between."""

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

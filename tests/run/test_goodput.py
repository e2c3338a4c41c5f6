"""Where the time of a run went, over all its processes."""

import math

import pytest

from imgclf_jax.run import goodput
from imgclf_jax.run.phases import Phases
from imgclf_jax.run.writers import read_metrics


def line(began, at, first, step, **seconds):
    return {"step": step, "first": first, "began": began, "at": at, "seconds": seconds}


def test_a_killed_run_adds_up():
    """80 steps in 40 s, killed; 10 s later from step 60 on, to 100: a quarter of the first steps was for nothing."""
    lines = [
        line(1000.0, 1030.0, 0, 40, setup=10.0, steps=20.0),  # an earlier line of the same process
        line(1000.0, 1050.0, 0, 80, setup=10.0, steps=40.0),
        line(1060.0, 1085.0, 60, 100, setup=5.0, steps=20.0),
    ]
    total = goodput.sum_up(lines)
    found = {name: seconds for name, seconds in total.items() if seconds}
    assert found == {"setup": 15.0, "steps": 50.0, "recomputed": 10.0, "idle": 10.0}
    assert sum(total.values()) == 1085.0 - 1000.0
    assert goodput.goodput(total) == pytest.approx(50 / 85)


def test_a_clock_that_is_set_back_between_attempts():
    """By an hour: the attempts are those of a killed run, in the order of their lines."""
    lines = [line(9000.0, 9040.0, 0, 80, steps=40.0), line(5400.0, 5420.0, 60, 100, steps=20.0)]
    total = goodput.sum_up(lines)
    assert {name: seconds for name, seconds in total.items() if seconds} == {"steps": 50.0, "recomputed": 10.0}


def test_a_run_that_goes_back_behind_an_earlier_attempt():
    """A second apiece: 100 steps, from 90 on to 95, and from 50 on to 100, since a checkpoint was damaged."""
    lines = [
        line(0.0, 100.0, 0, 100, steps=100.0), line(100.0, 105.0, 90, 95, steps=5.0),
        line(105.0, 155.0, 50, 100, steps=50.0),
    ]  # fmt: skip
    total = goodput.sum_up(lines)
    assert {name: seconds for name, seconds in total.items() if seconds} == {"steps": 100.0, "recomputed": 55.0}


def test_a_process_that_rolls_back_adds_up(tmp_path):
    """A second apiece: 10,000 steps, a rollback to step 9,000 in the same process, and 100 steps more."""
    phases = Phases()
    first = goodput.TimeRecord(tmp_path, 0, phases)
    phases.seconds["steps"] += 10_000.0
    first.update(10_000, now=True)
    first.close()
    phases.begin_attempt()
    second = goodput.TimeRecord(tmp_path, 9000, phases)
    phases.seconds["steps"] += 100.0
    second.update(9100, now=True)
    second.close()
    lines = goodput.last_of_each(read_metrics(tmp_path / goodput.NAME))
    assert [(one["first"], one["step"], one["seconds"]["steps"]) for one in lines] == [
        (0, 10_000, 10_000.0), (9000, 9100, 100.0),
    ]  # fmt: skip
    assert lines[0]["at"] <= lines[1]["began"]
    total = goodput.sum_up(lines)
    assert (total["steps"], total["recomputed"]) == (9100.0, 1000.0)
    assert sum(total.values()) == pytest.approx(lines[1]["at"] - lines[0]["began"], abs=0.01)


def test_no_lines_and_damaged_ones():
    assert not any(goodput.sum_up([]).values())
    assert goodput.goodput(goodput.sum_up([])) == 0.0
    whole = line(1.0, 3.0, 0, 1, steps=2.0)
    wrong = [{"began": [1]}, {"began": "1"}, {"began": None}, {"began": math.nan}, {"at": {}}, {"first": "0"},
             {"first": 0.5}, {"seconds": []}, {"seconds": 2.0}, {"seconds": {"steps": "2"}}]  # fmt: skip
    assert goodput.last_of_each([{"step": 3}, *({**whole, **change} for change in wrong)]) == []
    assert goodput.sum_up([{"step": 3}, whole, {**whole, "began": [1]}])["steps"] == 2.0

"""The comparison of two runs, on records written by hand."""

import math

import pytest

from imgclf_jax.run.provenance import Difference
from imgclf_jax.tools.reproduce.reproduction import Comparison, Value, compare, find_absent, list_differences, verdict


def line(step: int, whole: str, **params: str) -> dict:
    return {"step": step, "params_sha256": whole, "params": params}


OLD = [line(0, "a", x="1", y="1"), line(1, "b", x="2", y="2"), line(4, "c", x="3", y="3"), line(9, "d", x="4", y="4")]
METRICS = [{"step": 4, "train/loss": 0.5, "train/images_per_second": 10.0}, {"step": 4, "test/accuracy": 0.9},
           {"step": 9, "train/loss": 0.25, "test/examples": 360}]  # fmt: skip


def test_equal():
    """Times are not compared, nor are values that only one of them has."""
    here = [{**METRICS[0], "train/images_per_second": 99.0}, *METRICS[1:], {"step": 12, "train/loss": 7.0}]
    found = compare((OLD, METRICS, {}), (OLD, here))
    assert (found.digest_steps, [value.step for value in found.values]) == ((0, 1, 4, 9), [4, 4, 9, 9])
    assert found.first_step is None
    assert found.largest is None
    assert verdict(found, []) == "same"


def test_the_first_step_and_parameter_that_differ():
    new = [OLD[0], OLD[1], line(4, "z", x="3", y="9"), line(9, "y", x="9", y="9")]
    found = compare((OLD, METRICS, {}), (new, [{"step": 9, "train/loss": 0.2, "test/examples": 360}]))
    assert found.parameters
    assert found.parameters._asdict() == {
        "step": 4, "names": ("y",), "of": 2, "recorded": "3", "here": "9", "equal_until": 1
    }  # fmt: skip
    assert (found.first_step, found.first_value) == (4, Value(9, "train/loss", 0.25, 0.2))
    assert found.first_value.relative == pytest.approx(0.2)
    assert verdict(found, []) == "different"


def test_a_run_that_went_on_with_another_total_or_other_cadences():
    """It had ended at step 6 and logged there, so its next log, at 9, has means over other steps."""
    old = [{"step": 6, "train/loss": 1.0}, {"step": 9, "train/loss": 2.0}, {"step": 9, "test/loss": 3.0},
           {"step": 12, "train/loss": 4.0}]  # fmt: skip
    new = [{"step": 9, "train/loss": 1.5, "test/loss": 3.0}, {"step": 12, "train/loss": 4.0}]
    found = compare((OLD, old, {}), ([*OLD, line(12, "z")], new), moved=True)
    assert found.values == (Value(9, "test/loss", 3, 3), Value(12, "train/loss", 4, 4))
    assert found.missing == ()
    lacking = compare((OLD, old, {}), ([line(12, "z")], new))
    assert (lacking.missing, verdict(lacking, [], tolerance=1.0)) == (((6, "train/loss"),), "different")


@pytest.mark.parametrize(("digests", "metrics", "lacks"), [
    (OLD, METRICS, ()),
    (OLD, METRICS[:2], ((9, "test/examples"), (9, "train/loss"))),  # the last line
    ([OLD[0], OLD[1], OLD[3]], METRICS, ((4, "parameters"),)),
    (OLD, [], ((4, "test/accuracy"), (4, "train/loss"), (9, "test/examples"), (9, "train/loss"))),
    (OLD, [{"step": 4, "train/loss": 0.5}, METRICS[1], {"step": 9, "train/loss": 0.2}], ((9, "test/examples"),)),
])  # fmt: skip
def test_what_the_record_lacks(digests, metrics, lacks):
    """Steps and metrics that the reproduction has; not a metric that the run's version did not compute."""
    here = [METRICS[0] | {"train/new": 1.0}, *METRICS[1:]]
    found = find_absent((digests, metrics), (OLD, here), lambda step: step in (0, 1, 4), 9)
    assert set(found) - {(4, "train/new")} == set(lacks)
    compared = Comparison((0,), (), None, absent=found)
    assert verdict(compared, []) == ("incomplete" if found else "same")


def test_a_result_is_compared_too():
    """A number in result.json that the reproduction does not have, although metrics.jsonl has it right."""
    result = {"step": 9, "params_sha256": "d", "test": {"examples": 361}}
    found = compare((OLD, METRICS, result), (OLD, METRICS))
    assert (found.first_value, found.parameters) == (Value(9, "test/examples", 361, 360), None)


def version(kind: str = "version") -> Difference:
    return Difference(kind, "jax", "0.11", "0.12")


@pytest.mark.parametrize(("here", "found", "tolerance", "word"), [
    (0.5, [version("data")], 0, "same"),  # what else differs does not matter
    (0.5001, [version("device"), version("flags"), version("place")], 0, "rounding"),
    (0.5001, [version("place")], 0, "different"),
    (0.5001, [version(), version("code")], 0, "different"),
    (0.5001, [], 0, "different"),
    (0.51, [version()], 0, "different"),
    (0.51, [], 0.05, "tolerated"),
    (0.51, [version("data")], 0.01, "different"),
    (math.nan, [version()], 1.0, "different"),
])  # fmt: skip
def test_the_verdict(here, found, tolerance, word):
    compared = compare((OLD, [{"step": 4, "m": 0.5}], {}), (OLD, [{"step": 4, "m": here}]))
    assert verdict(compared, found, tolerance) == word


BEGAN = {
    "step": 0, "keys": {"total": "9 steps"}, "processor": "EPYC", "processes": 1, "packages": {"jax": "0.12"},
    "code": "a" * 64, "git": {"commit": "1" * 40}, "modules": {"my_nets.py": "c" * 64},
}  # fmt: skip


def test_differences_from_any_start_of_the_run():
    """A cluster gave it another host after a preemption, its code was fixed, and it was extended."""
    later = BEGAN | {"step": 5, "processor": "Xeon", "modules": {"my_nets.py": "d" * 64}, "keys": {"total": "20 steps"}}
    assert [tuple(one) for one in list_differences([BEGAN, later], BEGAN)] == [
        ("code", "modules.my_nets.py from step 5 on", "d" * 16 + "…", "c" * 16 + "…"),
        ("device", "processor from step 5 on", "Xeon", "EPYC"),
    ]
    here = BEGAN | {"processor": "Xeon"}
    found = list_differences([BEGAN, BEGAN | {"step": 5}], here)  # named once
    assert [tuple(one) for one in found] == [("device", "processor", "EPYC", "Xeon")]
    assert verdict(Comparison((5,), (Value(5, "train/loss", 1.0, 1.0001),), None), found) == "rounding"

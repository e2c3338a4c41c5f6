"""The comparison of two runs, on records written by hand."""

import math

import pytest

from imgclf_jax.tools.reproduce.reproduction import Comparison, Difference, Value, compare, differences, verdict


def line(step: int, whole: str, **params: str) -> dict:
    return {"step": step, "params_sha256": whole, "params": params}


OLD = [line(0, "a", x="1", y="1"), line(1, "b", x="2", y="2"), line(4, "c", x="3", y="3"), line(9, "d", x="4", y="4")]
METRICS = [{"step": 4, "train/loss": 0.5, "train/images_per_second": 10.0}, {"step": 4, "test/accuracy": 0.9},
           {"step": 9, "train/loss": 0.25, "test/examples": 360}]  # fmt: skip


def test_equal():
    """Times are not compared, nor are values that only one of them has."""
    here = [{**METRICS[0], "train/images_per_second": 99.0}, *METRICS[1:], {"step": 12, "train/loss": 7.0}]
    found = compare((OLD, METRICS, {}), (OLD[:3], here))
    assert (found.digest_steps, len(found.values), found.metric_steps) == ((0, 1, 4), 4, 2)
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


def test_a_run_without_digests_has_that_of_its_result():
    found = compare(([], METRICS, {"step": 9, "params_sha256": "other"}), (OLD, METRICS))
    assert found.parameters
    assert found.parameters._asdict() == {
        "step": 9, "names": (), "of": 2, "recorded": "other", "here": "d", "equal_until": None
    }  # fmt: skip
    assert compare(([], METRICS, {"step": 9, "params_sha256": "d"}), (OLD, METRICS)).first_step is None


def test_an_extended_run_has_a_shorter_window_once():
    """It had ended at step 6 and logged there, so its next log, at 9, has means over other steps."""
    old = [{"step": 6, "train/loss": 1.0}, {"step": 9, "train/loss": 2.0}, {"step": 9, "test/loss": 3.0},
           {"step": 12, "train/loss": 4.0}]  # fmt: skip
    new = [{"step": 9, "train/loss": 1.5, "test/loss": 3.0}, {"step": 12, "train/loss": 4.0}]
    assert compare(([], old, {}), ([], new), [6]).values == (Value(9, "test/loss", 3, 3), Value(12, "train/loss", 4, 4))
    assert compare(([], old, {}), ([], new)).first_step == 9
    assert compare(([], old, {}), ([], [{"step": 6, "train/loss": 1.0}, *new]), [6]).first_step == 9


def version(kind: str = "version") -> Difference:
    return Difference(kind, "jax", "0.11", "0.12")


@pytest.mark.parametrize(("here", "found", "tolerance", "word"), [
    (0.5, [version("data")], 0, "same"),  # what else differs does not matter
    (0.5001, [version()], 0, "rounding"),
    (0.5001, [version("device"), version("flags")], 0, "rounding"),
    (0.5001, [version(), version("place")], 0, "rounding"),
    (0.5001, [version("place")], 0, "different"),
    (0.5001, [version(), version("code")], 0, "different"),
    (0.5001, [version(), version("config")], 0, "different"),
    (0.5001, [], 0, "different"),
    (0.51, [version()], 0, "different"),
    (0.51, [], 0.05, "tolerated"),
    (0.51, [version("data")], 0.01, "different"),
    (math.nan, [version()], 1.0, "different"),
])  # fmt: skip
def test_the_verdict(here, found, tolerance, word):
    assert (
        verdict(compare((OLD, [{"step": 4, "m": 0.5}], {}), (OLD, [{"step": 4, "m": here}])), found, tolerance) == word
    )


def test_digests_alone_are_within_no_tolerance():
    found = compare((OLD, [], {}), ([line(0, "z", x="1", y="0")], []))
    assert verdict(found, [version()], 1.0) == "different"
    assert isinstance(found, Comparison)


WHOLE = {
    "python": "3.13.5", "packages": {"jax": "0.12", "zlib-ng": "1"}, "versions": {"jax": "0.12"}, "code": "a" * 64,
    "git": {"commit": "1" * 40, "changed": False}, "devices": ["cpu: cpu"] * 2, "processor": "EPYC", "processes": 1,
    "xla_flags": "--a=1 --b=2", "platform": "Linux", "jax_options": {"JAX_A": "1"},
    "modules": {"my_nets.py": "c" * 64, "gone.py": "g"},
    "data": {"fingerprint": "f" * 64, "train_examples": 5, "image_shape": [1, 2, 3], "class_names": ["x"]},
}  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), [
    ({}, []),
    ({"xla_flags": "--b=2  --a=1", "command": ["x"]}, []),
    ({"data": WHOLE["data"] | {"fingerprint": "e" * 64}},
     [("data", "fingerprint", "f" * 16 + "…", "e" * 16 + "…")]),
    ({"unreadable": {"files": ["b.png"]}}, [("data", "unreadable files left out", "[]", "['b.png']")]),
    ({"init_from": {"sha256": "5"}}, [("weights", "init_from", "none", "5")]),
    ({"code": "b" * 64}, [("code", "files of imgclf_jax", "a" * 16 + "…", "b" * 16 + "…")]),
    ({"modules": {"my_nets.py": "b" * 64, "new.py": "n"}},
     [("code", "my_nets.py", "c" * 16 + "…", "b" * 16 + "…")]),
    ({"git": {"commit": "2" * 40}}, []),  # the files are the same
    ({"code": None, "git": {"commit": "2" * 40, "changed": True}},
     [("code", "git commit", "1" * 12, "2" * 12 + ", changed")]),
    ({"packages": {"jax": "0.11", "zlib-ng": "2"}},
     [("version", "jax", "0.12", "0.11"), ("version", "zlib-ng", "1", "2")]),
    ({"packages": {"jaxlib": "1", "a": "1", "b": "1", "c": "1", "d": "1", "e": "1"}},
     [("version", "jax", "0.12", "absent"), ("version", "jaxlib", "absent", "1"),
      ("version", "packages in one only", "1: zlib-ng", "5: a, b, c, d, …")]),
    ({"packages": None, "versions": {"jax": "0.11"}}, [("version", "jax", "0.12", "0.11")]),
    ({"devices": ["gpu: H100"]}, [("device", "devices", "2 x cpu: cpu", "1 x gpu: H100")]),
    ({"processor": "Xeon", "python": "3.12"},
     [("version", "Python", "3.13.5", "3.12"), ("device", "processor", "EPYC", "Xeon")]),
    ({"jax_options": {"JAX_B": "2"}}, [("flags", "JAX_A", "1", "not set"), ("flags", "JAX_B", "not set", "2")]),
    ({"compiler_options": {"NVIDIA_TF32_OVERRIDE": "0"}}, []),  # which older versions did not record
    ({"xla_flags": "--a=3 --b=2 --c"}, [("flags", "--a", "1", "3"), ("flags", "--c", "not set", "set")]),
])  # fmt: skip
def test_what_differs_beside(change, expected):
    assert [tuple(one) for one in differences(WHOLE, WHOLE | change)] == expected


def test_code_that_changed_in_the_middle_of_a_run():
    """Here the whole run is computed by one of the two versions."""
    old = WHOLE | {"changed_code": [{"step": 5, "files": {"my_nets.py": "d" * 64, "imgclf_jax": "a" * 64}}]}
    assert [tuple(one) for one in differences(old, WHOLE)] == [
        ("code", "my_nets.py from step 5 on", "d" * 16 + "…", "c" * 16 + "…")
    ]


def test_a_run_that_went_on_on_another_processor():
    """A cluster gave it another host after a preemption."""
    old = WHOLE | {"changed_code": [{"step": 5, "environment": {"processor": "Xeon", "jax": "0.13"}}]}
    assert [tuple(one) for one in differences(old, WHOLE)] == [
        ("device", "processor from step 5 on", "Xeon", "EPYC"),
        ("version", "jax from step 5 on", "0.13", "0.12"),
    ]


def test_a_run_that_went_on_on_more_devices():
    """Its reproduction on the devices that it began on differs by rounding, and names them."""
    elsewhere = {"number of devices": "4", "processes": "2", "XLA_FLAGS": "--a=3", "NVIDIA_TF32_OVERRIDE": "0"}
    old = WHOLE | {"changed_code": [{"step": 5, "environment": elsewhere}]}
    found = differences(old, WHOLE | {"compiler_options": {"NVIDIA_TF32_OVERRIDE": ""}})
    assert [tuple(one) for one in found] == [
        ("device", "number of devices from step 5 on", "4", "2"),
        ("device", "processes from step 5 on", "2", "1"),
        ("flags", "XLA_FLAGS from step 5 on", "--a=3", "--a=1 --b=2"),
        ("flags", "NVIDIA_TF32_OVERRIDE from step 5 on", "0", "not set"),
    ]
    value = Value(5, "train/loss", 1.0, 1.0001)
    assert verdict(Comparison((5,), (value,), None), found) == "rounding"


def test_a_record_without_provenance_differs_in_nothing():
    assert differences({}, WHOLE) == []
    assert differences({"data": 3, "versions": [], "devices": 1, "git": "x", "xla_flags": 4}, WHOLE) == []
    assert differences({"git": {"commit": -1e28}}, WHOLE) != []  # it had ended in a traceback

"""`launch.py reproduce`: it passes for the same run, and names the differences of another one."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import rewind, thorough
from recorded import STEPS, copy, edit, reproduce, trained  # noqa: F401  fixtures

import launch
from imgclf_jax.run.provenance import Difference
from imgclf_jax.tools.reproduce.reproduction import Comparison, Value, compare, find_absent, list_differences, verdict

pytestmark = pytest.mark.usefixtures("one_device")


def test_the_same_run_passes(reproduce, trained, tmp_path):
    """All digests and metrics; the temporary directory is removed."""
    status, found = reproduce(trained)
    assert (status, found["verdict"], found["first_step"]) == (0, "same", None)
    assert found["compared"] == {"digests": [0, 1, 2, 4, 8, 10], "metrics": 2 * 5 + 4}
    assert (found["step"], found["differences"], found["output"]) == (STEPS, [], None)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_some_steps(reproduce, trained, tmp_path):
    """The first ones, on the schedule of all, in a directory that is kept, with the same data elsewhere."""
    shutil.copy(trained.parent / "data.npz", tmp_path / "data.npz")
    words = (trained, "--steps=6", f"--output={tmp_path}/again", f"--config.data.source=arrays('{tmp_path}/data.npz')")
    status, out = reproduce(*words, format="table")
    assert status == 0
    assert out.startswith("The same, bit for bit.\nCompared up to step 6: all parameters at 4 steps, and 5 metric")
    assert f"the new run is in {tmp_path}/again" in out
    assert json.loads((tmp_path / "again" / "config.json").read_text())["total"] == f"{STEPS} steps"
    assert not (tmp_path / "again" / "result.json").exists()


@pytest.mark.thorough
def test_another_momentum_and_a_tolerance(reproduce, trained, tmp_path):
    """Momentum does not affect the first step, so the second is the first to differ. A tolerance may allow for it."""
    words = (trained, "--config.optimizer=sgd(momentum=0.91)", f"--output={tmp_path}/again")
    status, found = reproduce(*words)
    assert (status, found["first_step"], found["parameters"]["equal_until"]) == (1, 2, 1)
    [difference] = found["differences"]
    assert [*difference.values()] == ["config", "optimizer", "'sgd(momentum=0.9)'", "'sgd(momentum=0.91)'"]
    most = found["largest_metric"]["relative"]
    assert 0 < most < 0.1
    allowed = reproduce(*words, f"--tolerance={most * 1.01}")  # the run in the directory is done
    assert (allowed[0], allowed[1]["verdict"], allowed[1]["differences"]) == (0, "tolerated", found["differences"])
    assert reproduce(*words, f"--tolerance={most * 0.99}")[0] == 1


def test_an_image_that_changed(reproduce, trained, tmp_path):
    arrays = dict(np.load(trained.parent / "data.npz"))
    arrays["x_train"][7, 0, 0] ^= 255
    np.savez(tmp_path / "data.npz", **arrays)
    status, found = reproduce(trained, f"--config.data.source=arrays('{tmp_path}/data.npz')", "--steps=4")
    assert (status, found["verdict"]) == (1, "different")
    assert found["first_step"] in (1, 2, 4)
    assert [one["what"] for one in found["differences"]] == ["data.source", "data.fingerprint"]
    assert "data differs: data.fingerprint was" in reproduce.log


@pytest.mark.thorough
def test_a_module_of_the_user_that_changed(reproduce, trained, tmp_path, monkeypatch, capsys):
    """`reproduce` names the file, and so do a resumed run and commands that load the run."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own_loss_of_a_run.py"

    def write(scale: int) -> None:
        own.write_text(f"from imgclf_jax.losses import softmax\ndef scaled(x, y): return {scale} * softmax(x, y)\n")
        sys.modules.pop(own.stem, None)
        importlib.invalidate_caches()

    config = json.loads((trained / "config.json").read_text())
    words = [f"--workdir={tmp_path}/run", f"--config.loss={own.stem}:scaled", "--config.schedule=constant(1e-2)",
             *(f"--config.{key}={config[key]}" for key in ("preprocess", "model", "batch_size", "eval_every")),
             "--config.total=6 steps", "--config.checkpoint_every=4 steps", "--config.tensorboard=False",
             f"--config.data.source={config['data']['source']}"]  # fmt: skip
    write(1)
    assert launch.main(words) == 0
    write(11)
    status, found = reproduce(tmp_path / "run", "--trust")
    assert (status, found["verdict"]) == (1, "different")
    assert [(one["kind"], one["what"]) for one in found["differences"]] == [
        ("code", f"modules.{own.name}"), ("trace", "traced.train"), ("trace", "traced.eval")
    ]  # fmt: skip
    assert launch.main(["evaluate", f"--workdir={tmp_path}/run", "--trust"]) == 0
    assert f"{own.name} has changed since the run in {tmp_path}/run was trained" in capsys.readouterr().err
    rewind(tmp_path / "run", 4)
    assert launch.main(words) == 0
    assert f"modules.{own.name} was" in capsys.readouterr().err
    status, found = reproduce(tmp_path / "run", "--trust", "--steps=5")
    changed = [f"modules.{own.name}", "traced.train", "traced.eval"]
    assert (status, [one["what"] for one in found["differences"]]) == (1, changed)


def test_an_output_that_has_been_trained_before(trained, copy, capsys):
    """By the present code, it is compared without training, and the log says so; by other code, it is refused."""
    assert launch.main(["reproduce", str(trained), f"--output={copy}"]) == 0
    assert f"--output={copy} has been trained up to step {STEPS} before, by the present" in capsys.readouterr().err
    edit(copy / "provenance.json", lambda p: p.update(code="another"))
    assert launch.main(["reproduce", str(trained), f"--output={copy}"]) == 1
    said = f"error: --output={copy} has been trained up to step {STEPS} otherwise: code was another, here it is "
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "content", "says"), [
    ("digests.jsonl", b"garbage\n" * 7, "is damaged: 7 of its 7 lines hold no record"),
    ("digests.jsonl", b"", "is missing or empty"),
    ("metrics.jsonl", b"garbage\n" * 2, "is damaged: 2 of its 2 lines hold no record"),
], ids=["digests", "empty", "metrics"])  # fmt: skip
def test_a_record_that_is_damaged(copy, tmp_path, capsys, name, content, says):
    (copy / name).write_bytes(content)
    for words in ([], [f"--bundle={tmp_path}/damaged.zip"]):
        assert launch.main(["reproduce", str(copy), f"--output={tmp_path}/again", *words]) == 1
        assert f"{name} of {copy} {says}" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "damaged.zip").exists()


@pytest.mark.parametrize(("name", "keep", "lacks"), [
    ("metrics.jsonl", slice(-1), "test/accuracy at step 10"),
    *thorough(("digests.jsonl", slice(3), "parameters at step 4"),
              ("provenance.json", slice(0), "provenance.json at step 0"),
              ("result.json", slice(0), "result.json at step 10")),
], ids=["metrics", "digests", "provenance", "result"])  # fmt: skip
def test_a_record_that_lacks_something(reproduce, copy, name, keep, lacks):
    """Nothing that it has differs, and that is not the same."""
    lines = (copy / name).read_text().splitlines(keepends=True)[keep]
    (copy / name).write_text("".join(lines)) if lines else (copy / name).unlink()
    status, out = reproduce(copy, format="table")
    assert status == 1
    assert out.startswith("The record is incomplete; what it has is the same.\n")
    assert f"the first is {lacks}." in out


def test_another_result_beside_recorded_seeds(reproduce, trained, tmp_path):
    """As on another processor: is it as near to them as another seed would be?"""
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        shutil.copytree(trained, tmp_path / "runs" / str(seed))
        edit(tmp_path / "runs" / str(seed) / "config.json", lambda config, seed=seed: config.update(seed=seed))
        edit(tmp_path / "runs" / str(seed) / "result.json", lambda r, a=accuracy: r["test"].update(accuracy=a))
    here = json.loads((trained / "result.json").read_text())["test"]["accuracy"]
    status, found = reproduce(tmp_path / "runs" / "0")
    spread = found["spread"]
    assert (status, spread["metric"], spread["here"], spread["seeds"]) == (1, "test/accuracy", here, 3)
    assert (spread["mean"], spread["std"]) == (pytest.approx(0.6), pytest.approx(0.1))
    assert spread["errors"] == pytest.approx(abs(here - 0.6) / 0.1 / math.sqrt(4 / 3))


def test_a_bundle(reproduce, trained, tmp_path, capsys):
    """It replaces the work directory. The same run gives the same bytes."""
    for name in ("a.zip", "b.zip"):
        assert launch.main(["reproduce", str(trained), f"--bundle={tmp_path}/{name}"]) == 0
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    status, found = reproduce(tmp_path / "a.zip")
    assert (status, found["verdict"], len(found["compared"]["digests"])) == (0, "same", 6)
    assert launch.main(["reproduce", f"{tmp_path}/a.zip", f"--bundle={tmp_path}/c.zip"]) == 1
    assert "is a bundle already" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_result_of_the_readme(tmp_path):
    """Its first 45 steps, from the bundle that the results table links to, on the processor of the record."""
    root = Path(launch.__file__).parent
    command = [sys.executable, "launch.py", "reproduce", "docs/results/digits-0.zip", "--steps=45", "--format=json",
               f"--output={tmp_path / 'again'}"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    printed = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False).stdout
    found = json.loads(printed)
    if other := [one for one in found["differences"] if one["what"] in ("processor", "devices")]:
        pytest.skip(f"other devices round differently: {other[0]['recorded']} recorded, {other[0]['here']} here")
    assert (found["verdict"], found["compared"]["digests"]) == ("same", [0, 1, 2, 4, 8, 16, 32])


@pytest.mark.thorough
@pytest.mark.parametrize("value", ["0.5", None, True, [0.5]])
def test_what_was_recorded_and_is_no_number(reproduce, copy, value):
    """It differs from any number, and `report` leaves it out."""
    first, rest = (copy / "metrics.jsonl").read_text().split("\n", 1)
    (copy / "metrics.jsonl").write_text(json.dumps(json.loads(first) | {"train/loss": value}) + "\n" + rest)
    status, found = reproduce(copy)
    assert (status, found["verdict"], found["first_step"]) == (1, "different", 5)
    assert launch.main(["report", f"--workdir={copy}"]) == 0


@pytest.mark.thorough
def test_the_checkpoint_of_another_run(copy, tmp_path, capsys):
    keys = json.loads((copy / "config.json").read_text())
    argv = [f"--workdir={tmp_path}/other", "--config.seed=1", f"--config.data.source={keys['data']['source']}",
            *(f"--config.{key}={keys[key]}" for key in ("preprocess", "model", "batch_size", "total"))]  # fmt: skip
    assert launch.main([*argv, "--config.optimizer=sgd(momentum=0.9)"]) == 0
    shutil.rmtree(copy / "checkpoints" / "10")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "10", copy / "checkpoints" / "10")
    where = f"{copy}/checkpoints/10 holds other parameters than {copy}/digests.jsonl records for step 10"
    own = (*argv[2:], "--config.schedule=cosine(1e-2)", "--config.optimizer=sgd(momentum=0.9)")
    for words in ([f"--workdir={copy}", *own], ["evaluate", f"--workdir={copy}"], ["report", f"--workdir={copy}"],
                  [f"--workdir={tmp_path}/new", *argv[1:], f"--config.init_from={copy}"]):  # fmt: skip
        capsys.readouterr()
        assert launch.main(words) == 1
        assert f"error: checkpoint {where}" in capsys.readouterr().err.splitlines()[-1]


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

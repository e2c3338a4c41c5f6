"""What commands on a run say about the user's modules that have changed since it was trained."""

import importlib
import json
import sys

import jax
import numpy as np
import pytest

import launch
from imgclf_jax.run.provenance import processor
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.reproduce.reproduction import differences

BEFORE = """
def same(image):
    return image

def views():
    return [(1.0, lambda images: images)]
"""
AFTER = BEFORE.replace("return image\n", "return 255 - image\n").replace(": images)", ": -images)")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a new version of the module my_changing, which the next import reads."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(code):
        (tmp_path / "my_changing.py").write_text(code)
        importlib.invalidate_caches()
        sys.modules.pop("my_changing", None)
        importlib.import_module("my_changing")

    yield write
    sys.modules.pop("my_changing", None)


def test_a_record_of_changes_that_is_damaged_says_nothing(tmp_path, module):
    module(BEFORE)
    workdir = Workdir(tmp_path)
    for damaged in (3, [3], [{"step": "4", "files": {}}], [{"step": 4, "files": 3}], [{"files": {}}]):
        recorded = {"modules": {"my_changing.py": "another"}, "changed_code": damaged}
        workdir.provenance.write_text(json.dumps(recorded))
        assert workdir.changed_modules() == ["my_changing.py"]
        assert differences(recorded, recorded) == []


def test_a_run_that_resumes_on_another_processor_warns_and_records_it_once(tmp_path, caplog):
    workdir = Workdir(tmp_path)
    workdir.provenance.write_text(json.dumps({"processor": "Xeon", "devices": ["cpu: cpu"] * len(jax.devices())}))
    workdir.record_code(5)
    told = f"changed since the run began, in effect from step 5 on: processor (now {processor()})"
    assert told in caplog.text
    (change,) = json.loads(workdir.provenance.read_text())["changed_code"]
    assert change == {"step": 5, "environment": {"processor": processor()}}
    caplog.clear()
    workdir.record_code(9)  # on the same one
    assert not caplog.text


@pytest.mark.thorough
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("key", ["preprocess=decode(1)|my_changing:same", "tta=my_changing:views"])
def test_commands_on_a_run_whose_module_has_changed(tmp_path, module, capsys, key):
    """`evaluate` warns of its other scores, `compare --test` makes no predictions, `reproduce` names the module."""
    run, out = tmp_path / "runs" / "a", ["--format=json"]
    words = ["--config.data.source=fake(96, (8, 8, 1), 4)", "--config.batch_size=32",
             "--config.preprocess=decode(1)", f"--config.{key}",
             "--config.augment=normalize", "--config.model=mlp(widths=(8,))",
             "--config.total=8 steps", "--config.checkpoint_every=4 steps", "--config.eval_every=4 steps",
             "--config.schedule=constant(1e-2)", "--config.tensorboard=False"]  # fmt: skip
    module(BEFORE)
    assert launch.main([f"--workdir={run}", *words]) == 0
    recorded = json.loads((run / "result.json").read_text())["test"]["nll"]
    capsys.readouterr()

    def evaluate():
        assert launch.main(["evaluate", f"--workdir={run}", "--trust", *out]) == 0
        text, log = capsys.readouterr()
        return json.loads(text)["test"]["nll"], log

    nll, log = evaluate()
    assert np.isclose(nll, recorded)
    assert "has changed" not in log
    module(AFTER)
    sys.modules.pop("my_changing")  # as in a new process, which imports it when it needs it
    nll, log = evaluate()
    assert not np.isclose(nll, recorded)
    assert f"my_changing.py has changed since the run in {run} was trained" in log
    assert launch.main(["report", f"--workdir={run}", "--trust"]) == 0
    assert "Code has changed since the run trained (my_changing.py)" in (run / "report.html").read_text()
    capsys.readouterr()
    assert launch.main(["compare", str(run.parent), "--test", "--trust"]) == 0
    assert "my_changing.py has changed since training" in capsys.readouterr().err
    assert not (run / "predictions.npz").exists()
    assert launch.main(["reproduce", str(run), "--trust", *out]) == 1
    text, log = capsys.readouterr()
    assert "code differs: my_changing.py was" in log
    found = json.loads(text)
    assert [one["what"] for one in found["differences"]] == ["my_changing.py"]

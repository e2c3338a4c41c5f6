"""What commands on a run say about the user's modules that have changed since it was trained."""

import importlib
import json
import sys

import numpy as np
import pytest

import launch
from imgclf_jax import config as configs
from imgclf_jax.core.errors import UserError
from imgclf_jax.data.info import DataInfo
from imgclf_jax.run.provenance import processor, take_snapshot
from imgclf_jax.run.workdir import Workdir

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


def test_a_run_that_resumes_elsewhere_says_so_once(tmp_path, caplog):
    """provenance.json has a snapshot for each start. One that saved no checkpoint leaves none."""
    workdir, config = Workdir(tmp_path), configs.to_json(configs.default_config())
    here = take_snapshot({}, DataInfo(8, (1, 1, 1), ("x",), "f"))
    workdir.record(config, here | {"processor": "Xeon", "init_from": {"sha256": "s"}}, 0)
    assert not caplog.text
    workdir.record(config, here, 5)
    told = f"changed since the run began, in effect from step 5 on: processor was Xeon, here it is {processor()}"
    assert told in caplog.text
    caplog.clear()
    workdir.record(config, here, 9)  # on the same one
    assert not caplog.text
    assert [(one["step"], one["processor"], one["init_from"]) for one in workdir.read_snapshots()] == [
        (0, "Xeon", {"sha256": "s"}), (5, processor(), {"sha256": "s"}), (9, processor(), {"sha256": "s"})]  # fmt: skip
    workdir.record(config, here, 4)
    assert [one["step"] for one in workdir.read_snapshots()] == [0, 4]
    workdir.record(config, here, 0)
    assert [one["step"] for one in workdir.read_snapshots()] == [0]


@pytest.mark.parametrize(("change", "said"), [
    ({"data": DataInfo(8, (1, 1, 1), ("x",), "g")}, "data.fingerprint was f, here it is g"),
    ({"evals": {"test": "b"}}, "evals.test was a, here it is b"),
    ({"unreadable": ["b.png"]}, "unreadable was 0: , here it is 1: b.png"),
    ({"init_from": {"sha256": "b", "path": "elsewhere"}}, "init_from.sha256 was a, here it is b"),
    ({"fixed_sha256": "b"}, "fixed_sha256 was a, here it is b"),
])  # fmt: skip
def test_other_data_or_weights_are_refused(tmp_path, change, said):
    workdir, config = Workdir(tmp_path), configs.to_json(configs.default_config())
    further = {"evals": {"test": "a"}, "unreadable": [], "fixed_sha256": "a", "init_from": {"sha256": "a", "path": "x"}}
    data = DataInfo(8, (1, 1, 1), ("x",), "f")
    workdir.record(config, take_snapshot({}, data, **further), 0)
    workdir.check_snapshot(take_snapshot({}, data, **further | {"init_from": {"sha256": "a", "path": "elsewhere"}}))
    with pytest.raises(UserError, match=f"holds a run on other data or weights: {said}; restore them, or pass another"):
        workdir.check_snapshot(take_snapshot({}, change.pop("data", data), **further | change))
    workdir.config.unlink()  # a kill left provenance.json alone: the run has not begun
    workdir.check_snapshot(take_snapshot({}, DataInfo(8, (1, 1, 1), ("x",), "g")))


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
    assert "code differs: modules.my_changing.py was" in log
    found = json.loads(text)
    assert [one["what"] for one in found["differences"]] == ["modules.my_changing.py"]

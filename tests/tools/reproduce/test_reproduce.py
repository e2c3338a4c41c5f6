"""`launch.py reproduce`: it passes for the same run, and names the differences of another one."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import pytest
from recorded import STEPS, append, copy, edit, reproduce, trained  # noqa: F401  fixtures

import launch
from imgclf_jax.run import writers

pytestmark = pytest.mark.usefixtures("one_device")


def test_the_same_run_passes(reproduce, trained, tmp_path):
    """All digests and metrics; the temporary directory is removed."""
    status, found = reproduce(trained)
    assert (status, found["verdict"], found["first_step"]) == (0, "same", None)
    assert found["compared"] == {"digests": [0, 1, 2, 4, 8, 10], "metrics": 2 * 5 + 4}
    assert (found["step"], found["differences"], found["output"]) == (STEPS, [], None)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_some_steps(reproduce, trained, tmp_path):
    """The first ones, on the schedule of all, in a directory that is kept."""
    status, out = reproduce(trained, "--steps=6", f"--output={tmp_path}/again", format="table")
    assert status == 0
    assert out.splitlines() == [
        "The same, bit for bit.",
        "Compared up to step 6: all parameters at 4 steps, and 5 metric values at 1 steps.",
        f"the new run is in {tmp_path}/again",
    ]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["total"] == f"{STEPS} steps"
    assert not (tmp_path / "again" / "result.json").exists()


@pytest.mark.thorough
def test_a_library_that_was_edited(reproduce, trained, monkeypatch):
    """A default of Optax: the first step and parameter are named, and no recorded fact explains it."""
    defaults = list(optax.sgd.__defaults__)
    assert defaults[1] is False  # `nesterov`
    defaults[1] = True
    monkeypatch.setattr(optax.sgd, "__defaults__", tuple(defaults))
    status, found = reproduce(trained)
    assert (status, found["verdict"], found["first_step"]) == (1, "different", 1)
    assert found["parameters"]["names"][0] == "backbone/dense0/bias"
    assert (found["parameters"]["step"], found["parameters"]["equal_until"], found["parameters"]["of"]) == (1, 0, 4)
    assert found["first_metric"]["step"] == 5
    assert found["differences"] == []
    assert Path(found["output"], "metrics.jsonl").is_file()


@pytest.mark.thorough
def test_another_momentum_and_a_tolerance(reproduce, trained, tmp_path):
    """Momentum does not affect the first step, so the second is the first to differ. A tolerance may allow for it."""
    words = (trained, "--config.optimizer=sgd(momentum=0.91)", f"--output={tmp_path}/again")
    status, found = reproduce(*words)
    assert (status, found["first_step"], found["parameters"]["equal_until"]) == (1, 2, 1)
    assert [list(one.values()) for one in found["differences"]] == [
        ["config", "optimizer", "'sgd(momentum=0.9)'", "'sgd(momentum=0.91)'"]
    ]
    most = found["largest_metric"]["relative"]
    assert 0 < most < 0.1
    allowed = reproduce(*words, f"--tolerance={most * 1.01}")  # the run in the directory is done
    assert (allowed[0], allowed[1]["verdict"], allowed[1]["differences"]) == (0, "tolerated", found["differences"])
    assert reproduce(*words, f"--tolerance={most * 0.99}")[0] == 1


def test_an_image_that_changed(reproduce, trained, tmp_path):
    """One pixel of one image: the data are named."""
    arrays = dict(np.load(trained.parent / "data.npz"))
    arrays["x_train"][7, 0, 0] ^= 255
    np.savez(tmp_path / "data.npz", **arrays)
    status, found = reproduce(trained, f"--config.data.source=arrays('{tmp_path}/data.npz')", "--steps=4")
    assert (status, found["verdict"]) == (1, "different")
    assert found["first_step"] in (1, 2, 4)
    assert [(one["kind"], one["what"]) for one in found["differences"]] == [
        ("place", "data.source"),
        ("data", "data.fingerprint"),
    ]
    assert "data differs: data.fingerprint was" in reproduce.log


@pytest.mark.thorough
def test_a_module_of_the_user_that_changed(reproduce, trained, tmp_path, monkeypatch, capsys):
    """`reproduce` names the file, and so do a resumed run, which records it, and commands that load the run."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own_loss_of_a_run.py"
    content = (
        "import imgclf_jax.losses as l\n\ndef scaled(logits, labels):\n    return {} * l.softmax(logits, labels)\n"
    )

    def write(scale: int) -> None:
        own.write_text(content.format(scale))
        sys.modules.pop(own.stem, None)
        importlib.invalidate_caches()

    config = json.loads((trained / "config.json").read_text())
    words = [f"--workdir={tmp_path}/run", f"--config.loss={own.stem}:scaled", "--config.schedule=constant(1e-2)",
             *(f"--config.{key}={config[key]}" for key in ("preprocess", "model", "batch_size", "eval_every")),
             "--config.tensorboard=False", f"--config.data.source={config['data']['source']}"]  # fmt: skip
    write(1)
    assert launch.main([*words, "--config.total=4 steps"]) == 0
    write(11)
    status, found = reproduce(tmp_path / "run", "--trust")
    assert (status, found["verdict"]) == (1, "different")
    assert [(one["kind"], one["what"]) for one in found["differences"]] == [("code", f"modules.{own.name}")]
    assert launch.main(["evaluate", f"--workdir={tmp_path}/run", "--trust"]) == 0
    assert f"{own.name} has changed since the run in {tmp_path}/run was trained" in capsys.readouterr().err
    assert launch.main([*words, "--config.total=6 steps", "--extend"]) == 0
    err = capsys.readouterr().err
    assert "changed since the run began, in effect from step 4 on: keys.total was 4 steps, here it is 6 steps; " in err
    assert f"modules.{own.name} was" in err
    assert launch.main(["evaluate", f"--workdir={tmp_path}/run", "--trust"]) == 0
    assert "has changed" not in capsys.readouterr().err
    status, found = reproduce(tmp_path / "run", "--trust", "--steps=5")
    assert (status, [one["what"] for one in found["differences"]]) == (1, [f"modules.{own.name}"])


@pytest.mark.thorough
def test_other_versions_and_rounding(reproduce, copy):
    """A run of another version whose numbers differ by rounding: the output says so, and names the version."""
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    lines[0]["train/loss"] *= 1 + 1e-6
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    edit(copy / "provenance.json", lambda p: p["packages"].update(optax="0.1"))
    status, out = reproduce(copy, format="table")
    assert status == 1
    first, *rest = out.splitlines()
    assert first.startswith(
        "The same up to rounding: only versions, devices or flags differ, and no metric by more than"
    )
    assert first.endswith("(largest relative difference of a metric: 1e-06).")
    assert any("version" in line and "optax" in line and "0.1 " in line for line in rest)
    assert reproduce(copy, "--tolerance=1e-5")[0] == 0


@pytest.mark.thorough
def test_the_same_data_elsewhere(reproduce, trained, tmp_path):
    """The config is the same, and so is the fingerprint."""
    shutil.copy(trained.parent / "data.npz", tmp_path / "data.npz")
    status, found = reproduce(trained, f"--config.data.source=arrays('{tmp_path}/data.npz')", "--steps=1")
    assert (status, found["verdict"], [one["kind"] for one in found["differences"]]) == (0, "same", ["place"])


@pytest.mark.thorough
def test_a_signal(reproduce, trained, tmp_path, monkeypatch, capsys):
    """The run is saved and continues with the same command; until then nothing is compared."""
    write = writers.MetricsWriter.write_scalars

    def and_a_signal(*args):
        write(*args)
        monkeypatch.setattr(writers.MetricsWriter, "write_scalars", write)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(writers.MetricsWriter, "write_scalars", and_a_signal)
    assert launch.main(["reproduce", str(trained), f"--output={tmp_path}/again"]) == 75
    said = f"stopped before step {STEPS} without comparing; continue with --output={tmp_path}/again"
    assert capsys.readouterr().err.rstrip().endswith(said)
    status, found = reproduce(trained, f"--output={tmp_path}/again")
    assert (status, found["verdict"], found["compared"]["digests"]) == (0, "same", [0, 1, 2, 4, 8, 10])


def test_an_output_that_is_done(trained, copy, capsys):
    """As for another --tolerance; the log says that nothing is trained."""
    assert launch.main(["reproduce", str(trained), f"--output={copy}"]) == 0
    said = f"--output={copy} has been trained up to step {STEPS} before, by the present code: it is compared without"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("key", "done"), [("code", True), ("processor", True), ("code", False)])
def test_an_output_that_other_code_has_trained(trained, copy, capsys, key, done):
    """The verdict was "same", bit for bit, without training, whatever had changed since."""
    if not done:
        (copy / "result.json").unlink()
    edit(copy / "provenance.json", lambda p: p.update({key: "another"}))
    assert launch.main(["reproduce", str(trained), f"--output={copy}"]) == 1
    said = f"error: --output={copy} has been trained up to step {STEPS} otherwise: {key} was another, here it is "
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", None])
def test_a_run_without_digests(copy, capsys, content):
    """Nothing could be compared bit for bit."""
    (copy / "digests.jsonl").unlink() if content is None else (copy / "digests.jsonl").write_bytes(content)
    assert launch.main(["reproduce", str(copy)]) == 1
    assert f"digests.jsonl of {copy} is missing or empty" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "content", "says"), [
    ("digests.jsonl", b"garbage\n" * 7, "7 of its 7 lines hold no record"),
    ("digests.jsonl", b"\x00garbage", "1 of its 1 lines hold no record"),
    ("metrics.jsonl", b"garbage\n" * 2, "2 of its 2 lines hold no record"),
], ids=["digests", "no line break", "metrics"])  # fmt: skip
def test_a_record_that_is_damaged(copy, tmp_path, capsys, name, content, says):
    """It trains nothing."""
    (copy / name).write_bytes(content)
    for words in ([], [f"--bundle={tmp_path}/damaged.zip"]):
        assert launch.main(["reproduce", str(copy), f"--output={tmp_path}/again", *words]) == 1
        assert f"{name} of {copy} is damaged: {says}" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "damaged.zip").exists()


@pytest.mark.thorough
def test_a_line_that_a_crash_cut_short(reproduce, copy):
    """Only the last line may be truncated."""
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines) + lines[-1][:12])
    assert reproduce(copy, "--steps=1")[0] == 0
    (copy / "metrics.jsonl").write_text(lines[0][:12] + "\n" + "".join(lines[1:]))
    assert launch.main(["reproduce", str(copy)]) == 1


def test_a_bundle(reproduce, trained, tmp_path, capsys):
    """It replaces the work directory. The same run gives the same bytes."""
    for name in ("a.zip", "b.zip"):
        assert launch.main(["reproduce", str(trained), f"--bundle={tmp_path}/{name}"]) == 0
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    status, found = reproduce(tmp_path / "a.zip")
    assert (status, found["verdict"], len(found["compared"]["digests"])) == (0, "same", 6)
    assert launch.main(["reproduce", f"{tmp_path}/a.zip", f"--bundle={tmp_path}/c.zip"]) == 1
    assert "is a bundle already" in capsys.readouterr().err


def test_a_run_that_names_code(reproduce, copy, tmp_path, capsys):
    """The code is not imported, from a work directory or a bundle."""
    edit(copy / "config.json", lambda config: config.update(model=f"os:system('touch {tmp_path}/harm')"))
    assert launch.main(["reproduce", str(copy), f"--bundle={tmp_path}/a.zip"]) == 0
    for name in (copy, tmp_path / "a.zip"):
        assert launch.main(["reproduce", str(name)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"the run in {name} names" in error
        assert "add --trust" in error
    assert not (tmp_path / "harm").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_was_recorded_and_is_not_found_again(reproduce, copy):
    """A metric at a step where a run of this config logs none."""
    append(copy / "metrics.jsonl", '{"step": 3, "test/accuracy": 0.99}\n')
    status, found = reproduce(copy, "--steps=4")
    assert (status, found["verdict"], found["first_step"]) == (1, "different", 3)
    assert found["missing"] == [{"step": 3, "name": "test/accuracy"}]


@pytest.mark.thorough
def test_a_checkpoint_under_another_step(copy, capsys):
    """`evaluate` said "step 12" for the parameters of step 10, and `train` had "trained the last -2 of 10 steps"."""
    (copy / "checkpoints" / "10").rename(copy / "checkpoints" / "12")
    told = f"checkpoint {copy}/checkpoints/12 holds the state of step 10; name it 10 again, or remove it"
    for words in (["evaluate"], ["evaluate", "--checkpoint=12"], ["evaluate", "--checkpoints=12"]):
        capsys.readouterr()
        assert launch.main([*words, f"--workdir={copy}"]) == 1
        assert told in capsys.readouterr().err
    shutil.copytree(copy / "checkpoints" / "12", copy / "checkpoints" / "10")  # the latest that counts its own step
    assert launch.main(["evaluate", f"--workdir={copy}"]) == 0
    assert f"{told}; the checkpoint of step 10 is used" in capsys.readouterr().err


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


@pytest.mark.parametrize(("words", "status", "says"), [
    ([], 2, "reproduce takes one WORKDIR|BUNDLE, but got none"),
    (["{run}", "more"], 2, "reproduce takes one WORKDIR|BUNDLE, but got ["),
    (["{run}", "--steps=0"], 2, "--steps"),
    (["{run}", "--steps=11"], 1, "--steps=11: must be at most 10, the steps that the run in {run} recorded"),
    (["{run}", "--output={run}"], 1, "--output={run} is the run itself"),
    (["{run}", "--config.total=5 steps"], 1, "total='5 steps' is 5 steps, but the run in {run} recorded 10"),
    (["{run}", "--output={run}/config.json"], 1, "it is a file; pass another --output"),
    (["missing"], 1, "missing holds no run"),
    (["{run}/config.json"], 1, "config.json is not a readable bundle"),
])  # fmt: skip
def test_mistakes(trained, capsys, words, status, says):
    assert launch.main(["reproduce", *(word.format(run=trained) for word in words)]) == status
    assert says.format(run=trained) in capsys.readouterr().err

"""Mistakes about a run and its data: one clear sentence, and nothing is lost."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_mistakes import FAKE, ROOT, has, mistake, snapshot, whole  # noqa: F401  fixtures

import launch
from imgclf_jax import config as configs
from imgclf_jax.core import paths
from imgclf_jax.data import sampling
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import command as train

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.thorough
def test_changed_data(mistake, whole, capsys):
    workdir, argv = whole
    before, file = snapshot(workdir), workdir.parent / "data.npz"
    content = file.read_bytes()
    arrays = dict(np.load(file))
    arrays["x_train"][0, 0, 0] ^= 1
    np.savez(file, **arrays)
    try:
        sentence = mistake("train", f"--workdir={workdir}", *argv)
        assert has(sentence, f"{workdir} holds a run on other data or weights: data.fingerprint was", "restore them")
        assert launch.main(["evaluate", f"--workdir={workdir}"]) == 0
        assert "the data have changed since training" in capsys.readouterr().err
        file.unlink()
        assert has(mistake("train", f"--workdir={workdir}", *argv), f"cannot read '{file}'")
    finally:
        file.write_bytes(content)
    assert snapshot(workdir) == before


def test_paths_that_cannot_be_written(mistake, tmp_path):
    (tmp_path / "file").write_text("mine")
    places = {"file": "it is a file", "file/run": "Not a directory"}
    if Path("/proc/self").is_dir():
        places["/proc/run"] = "No such file"
    for place, reason in places.items():
        sentence = mistake(f"--workdir={tmp_path / place}", *FAKE)
        assert has(sentence, f"work directory {tmp_path / place} cannot be written", reason, "another --workdir")
    assert (tmp_path / "file").read_text() == "mine"
    assert has(mistake(f"--workdir={tmp_path}/\udcff", *FAKE), "or is not UTF-8, and no checkpoint can be saved there")


OF_RUNS = [
    (2, ["predict"], "name at least one image: FILE|DIR|GLOB"),
    (2, ["features"], "--output=: name an .npz file to write"),
    (2, ["features", "--output=a.npz", "--split=test", "a.png"], "drop one"),
    (2, ["probe", "--k=3,x"], "--k=3,x: must be a number of neighbors"),
    (2, ["evaluate", "--attack=pgd", "--corruptions=all"], "--corruptions and --attack print different things"),
    (2, ["evaluate", "--corruptions=all", "--predictions=a.csv"], "--corruptions and --predictions print different"),
    (2, ["evaluate", "--corruptions=pixelat"], "--corruptions: unknown corruption 'pixelat'"),
    (2, ["evaluate", "--predictions=a.txt"], "--predictions=a.txt: the name must end in .csv or .jsonl"),
    (2, ["evaluate", "--calibrate=vector", "--ood=x"], "--calibrate and --ood print different things"),
    (1, ["evaluate", "--attack=pdg(eps=8)"], "unknown attack 'pdg'"),
    (
        1,
        ["evaluate", "--calibrate=vector", "--config.data.eval.val=train[:10%]"],
        "val='train[:10%]' shares 6 examples with data.train='train'",
    ),
    (1, ["evaluate", "--calibrate=vector", "--config.data.eval.val=test"], "with data.eval.test='test'"),
    (1, ["predict", "a.png", "--reject=1"], "--reject=1: must be above 0 and below 1"),
    (1, ["predict", "a.png", "--coverage=nan"], "--coverage=nan: must be above 0 and below 1"),
    (1, ["explain", "a.png", "--class=eleven"], "unknown class 'eleven'"),
    (1, ["explain", "a.png", "--method=occlusion", "--layer=block0"], "--layer needs --method=gradcam"),
    (2, ["predict", "a.png", "--config=digits"], "predict uses the config that the run in RUN has recorded: drop --co"),
    (2, ["report", "--config=digits"], "report uses the config that the run in RUN has recorded: drop --config, and"),
    (1, ["reproduce", "--steps=13"], "--steps=13: must be at most 12, the steps that the run in RUN recorded"),
    (1, ["reproduce", "--output=RUN"], "--output=RUN is the run itself"),
    (1, ["reproduce", "--config.total=5 steps"], "total='5 steps' is 5 steps, but the run in RUN recorded 12"),
    (1, ["reproduce", "missing"], "missing holds no run"),
    (1, ["reproduce", "RUN/config.json"], "config.json is not a readable bundle"),
]


@pytest.mark.parametrize(("status", "argv", "said"), OF_RUNS)
def test_wrong_usage_of_a_run(mistake, whole, tmp_path, monkeypatch, status, argv, said):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (12, 12)).save("a.png")
    run, before = str(whole[0]), snapshot(whole[0])
    words = [word.replace("RUN", run) for word in argv]
    if words[0] != "reproduce":
        words.append(f"--workdir={run}")
    elif all(word.startswith("-") for word in words[1:]):
        words.append(run)
    assert has(mistake(*words, status=status, log=r"^\d\d:\d\d:\d\d|^  "), said.replace("RUN", run))
    assert snapshot(whole[0]) == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.thorough
def test_nothing_to_evaluate(mistake, whole, tmp_path):
    workdir, _ = whole
    before = snapshot(workdir)
    for which in ("7", "best", "newest"):
        sentence = mistake("evaluate", f"--workdir={workdir}", f"--checkpoint={which}")
        assert has(sentence, f"--checkpoint={which}", "[8, 12]", "checkpoint.best is not set")
    sentence = mistake("evaluate", f"--workdir={workdir}", "--config.model=mlp(widths=(16,))")
    assert has(sentence, "another model", "params/backbone/dense0/bias is float32[512]", "float32[16] by the config")
    (tmp_path / "empty").mkdir()
    assert has(mistake("predict", tmp_path / "empty", f"--workdir={workdir}"), "empty' has no images")
    assert snapshot(workdir) == before


@pytest.fixture
def copy(whole, tmp_path) -> tuple[Path, list[str]]:
    """A copy of a finished run, and its training arguments."""
    workdir, argv = whole
    shutil.copytree(workdir, tmp_path / "run")
    return tmp_path / "run", [f"--workdir={tmp_path / 'run'}", *argv]


@pytest.mark.parametrize("content", [b"{", b'{"data": 3}'])
@pytest.mark.parametrize("file", ["config.json", "provenance.json"])
def test_a_damaged_record(mistake, copy, file, content):
    workdir, argv = copy
    (workdir / file).write_bytes(content)
    for command in (["evaluate", f"--workdir={workdir}"], ["train", *argv]):
        assert has(mistake(*command), f"{workdir}/{file}")


def test_a_damaged_checkpoint_that_is_named(mistake, copy):
    workdir, _ = copy
    file = max((workdir / "checkpoints" / "12").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    *most, last = file.read_bytes()
    file.write_bytes(bytes([*most, last ^ 1]))  # whatever the byte was: files of checkpoints differ
    sentence = mistake("evaluate", f"--workdir={workdir}", "--checkpoint=12")
    assert has(sentence, f"checkpoint {workdir}/checkpoints/12 is damaged")


def test_a_result_cut_short_is_written_again(copy, capsys):
    workdir, argv = copy
    before = json.loads((workdir / "result.json").read_text())
    (workdir / "result.json").write_text("{")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line | ({"test/accuracy": 0.5} if "test/accuracy" in line else {}) for line in lines]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert launch.main(["train", *argv]) == 0
    after = json.loads((workdir / "result.json").read_text())
    assert before["params_sha256"] == after["params_sha256"]
    assert before["test"] == after["test"]
    assert after["images_per_second"] is None
    assert f"trained the last 0 of {after['step']} steps" in capsys.readouterr().out
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == len(lines)


def test_a_result_goes_when_its_run_is_trained_again(copy, caplog):
    workdir, _ = copy
    shutil.rmtree(workdir / "checkpoints")
    config = Workdir(workdir).load_config()
    one_step = lambda run: replace(run, cadences=replace(run.cadences, end=1))  # noqa: E731
    assert train.main(config, Workdir(workdir), transform_run=one_step) == 75
    assert "the run resumes at step 0" in caplog.text
    assert not (workdir / "result.json").exists()


@pytest.mark.parametrize("name", ["step", "train", "a/b"])
def test_a_set_that_results_have_no_room_for(mistake, whole, tmp_path, monkeypatch, name):
    monkeypatch.setattr("imgclf_jax.datasets.open_data", None)
    for command in (["train", f"--workdir={tmp_path}/run", *FAKE], ["evaluate", f"--workdir={whole[0]}"]):
        said = f"data.eval names a set {name!r}: use letters, digits, _ and -, and none of the names attack, epochs"
        assert has(mistake(*command, f"--config.data.eval.{name}=test"), said)


def test_checkpoints_without_a_config_are_no_start(copy, mistake):
    workdir, argv = copy
    (workdir / "config.json").unlink()
    before = snapshot(workdir)
    sentence = mistake("train", *argv, log=r"^\d\d:\d\d:\d\d")
    assert has(sentence, "config.json is missing beside checkpoints", "another --workdir")
    assert snapshot(workdir) == before


def kill_at_config(path, content, write=paths.write_atomically):
    if path.name == "config.json":
        raise SystemExit
    write(path, content)


def test_a_new_config_that_a_kill_keeps_from_being_written(copy, monkeypatch):
    """The run goes on with its old config, or with the new one by the same command, which is recorded once."""
    workdir, argv = Workdir(copy[0]), copy[1]
    old, new = workdir.load_config(), workdir.load_config()
    new.total = "20 steps"
    snapshot = workdir.read_snapshots()[0]
    snapshot |= {"keys": snapshot["keys"] | {"total": "20 steps"}}
    with monkeypatch.context() as patch:
        patch.setattr("imgclf_jax.core.paths.write_atomically", kill_at_config)
        with pytest.raises(SystemExit):
            workdir.record(configs.to_json(new), snapshot, 12)
    assert workdir.load_config() == old
    assert launch.main(["train", *argv]) == 0
    workdir.record(configs.to_json(new), snapshot, 12)
    assert workdir.load_config() == new
    assert [one["keys"]["total"] for one in workdir.read_snapshots()] == [old.total, "20 steps"]


def test_a_loss_that_is_not_finite(mistake, tmp_path, printed):
    """Stops with the step and its examples, and keeps the last good checkpoint."""
    burst = ("--config.optimizer=sgd", "--config.schedule=step(1e-2, at=('6 steps',), factor=1e35)")
    argv = (f"--workdir={tmp_path}", *FAKE, *burst)
    sentence = mistake(*argv, log=r"^\d\d:\d\d:\d\d|^  ")
    ids = sampling.example_ids(0, 6, 16, 64).tolist()
    assert has(sentence, "not finite at step 6", str(ids[:8])[:-1], "nonfinite.json", "good checkpoint is of step 4")
    assert json.loads((tmp_path / "nonfinite.json").read_text())["example_ids"] == ids
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [4]
    result = json.loads(printed("evaluate", f"--workdir={tmp_path}", "--format=json"))
    assert result["step"] == 4
    assert np.isfinite(result["test"]["loss"])


def test_output_that_nobody_reads():
    pipe = f"{sys.executable} {ROOT}/launch.py config | true"
    process = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True)
    assert (process.stdout, process.stderr) == ("", "")

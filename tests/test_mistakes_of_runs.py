"""Mistakes about a run and its data: one clear sentence, and nothing is lost."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_mistakes import FAKE, ROOT, _process_as_it_was, has, mistake, snapshot, whole  # noqa: F401  fixtures

import launch
from imgclf_jax.data import stream
from imgclf_jax.run.checkpoint import Checkpoints


def test_changed_data(mistake, whole, capsys):
    """Training stops; evaluation goes on and says so."""
    workdir, argv = whole
    before, file = snapshot(workdir), workdir.parent / "data.npz"
    content = file.read_bytes()
    arrays = dict(np.load(file))
    arrays["x_train"][0, 0, 0] ^= 1
    np.savez(file, **arrays)
    try:
        sentence = mistake("train", f"--workdir={workdir}", *argv)
        assert has(sentence, f"the data of the run in {workdir} have changed (another fingerprint)", "restore them")
        assert launch.main(["evaluate", f"--workdir={workdir}"]) == 0
        assert "the data have changed since training" in capsys.readouterr().err
        file.unlink()
        assert has(mistake("train", f"--workdir={workdir}", *argv), f"cannot read '{file}'")
    finally:
        file.write_bytes(content)
    assert snapshot(workdir) == before


def test_places_that_cannot_be_written(mistake, tmp_path):
    """A file in the directory's place, a path under one, and /proc where there is one."""
    (tmp_path / "file").write_text("mine")
    places = {"file": "it is a file", "file/run": "Not a directory"}
    if Path("/proc/self").is_dir():
        places["/proc/run"] = "No such file"
    for place, reason in places.items():
        sentence = mistake(f"--workdir={tmp_path / place}", *FAKE)
        assert has(sentence, f"work directory {tmp_path / place} cannot be written", reason, "another --workdir")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_network(mistake, tmp_path, monkeypatch):
    """The files to fetch, and where to put them, at once and not after minutes of retries."""

    def unreachable(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    argv = (*FAKE, "--config.data.source=tfds('mnist')", f"--config.data.data_dir={tmp_path / 'data'}")
    sentence = mistake("train", f"--workdir={tmp_path / 'run'}", *argv)
    assert has(
        sentence, "no network for TFDS data set 'mnist'", "--config.data.manual_dir", "train-images-idx3-ubyte.gz"
    )
    assert snapshot(tmp_path / "run") == {}


def test_nothing_to_evaluate(mistake, whole, tmp_path):
    """No run, no such checkpoint, another model, no files."""
    workdir, _ = whole
    before = snapshot(workdir)
    for command in ("evaluate", "predict"):
        sentence = mistake(command, f"--workdir={tmp_path}")
        assert has(sentence, f"{tmp_path} holds no run", "train first", "--workdir")
    for which in ("7", "best", "newest"):
        sentence = mistake("evaluate", f"--workdir={workdir}", f"--checkpoint={which}")
        assert has(sentence, f"--checkpoint={which}", "[8, 12]", "needs checkpoint.best")
    sentence = mistake("evaluate", f"--workdir={workdir}", "--config.model=mlp(widths=(16,))")
    assert has(sentence, "another model", "params/backbone/dense0/bias is float32[512]", "float32[16] by the config")
    assert has(mistake("predict", f"--workdir={workdir}"), "name at least one image file or directory")
    assert has(mistake("predict", "no.png", f"--workdir={workdir}"), "no file or directory 'no.png'")
    (tmp_path / "empty").mkdir()
    assert has(mistake("predict", tmp_path / "empty", f"--workdir={workdir}"), "empty' holds no files")
    assert snapshot(workdir) == before


@pytest.mark.parametrize("file", ["config.json", "provenance.json"])
def test_a_damaged_record(mistake, whole, tmp_path, file):
    workdir, argv = whole
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / file).write_text("{")
    for command in (["evaluate"], ["train", *argv]):
        assert has(mistake(*command, f"--workdir={tmp_path / 'run'}"), f"{tmp_path}/run/{file}", "damaged", "--workdir")


def test_a_loss_that_is_not_finite(mistake, tmp_path, capsys):
    """Stops with the step and its examples, and keeps the last checkpoint that was good."""
    burst = ("--config.optimizer=sgd", "--config.schedule=step(1e-2, at=('6 steps',), factor=1e35)")
    argv = (f"--workdir={tmp_path}", *FAKE, *burst)
    sentence = mistake(*argv, log=r"^\d\d:\d\d:\d\d|^[+|]|^Total")
    ids = stream.example_ids(0, 6, 16, 64).tolist()
    assert has(sentence, "not finite at step 6", str(ids[:8])[:-1], "nonfinite.json", "of step 4, is kept")
    assert json.loads((tmp_path / "nonfinite.json").read_text())["example_ids"] == ids
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [4]
    assert launch.main(["evaluate", f"--workdir={tmp_path}", "--format=json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 4
    assert np.isfinite(result["test"]["loss"])


def test_interrupted_before_the_loop(monkeypatch, capsys):
    """Ctrl-C during imports or while data are read leaves no traceback."""

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("imgclf_jax.config.load_file", interrupt)
    assert launch.main([]) == 130
    assert capsys.readouterr().err == "interrupted; run the same command again\n"


def test_output_that_nobody_reads():
    """`launch.py config | true` says nothing of a broken pipe."""
    pipe = f"{sys.executable} {ROOT}/launch.py config | true"
    process = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True)
    assert (process.stdout, process.stderr) == ("", "")

"""What reading a run may do: a work directory that someone else made runs none of their code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import thorough
from test_mistakes import FAKE, ROOT, has, mistake  # noqa: F401  fixtures

import launch
from imgclf_jax.run.record import Record

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert launch.main([f"--workdir={workdir}", *FAKE]) == 0
    return workdir


def changed(run, target, changes):
    """A copy of a run whose config has other values, by dotted keys."""
    shutil.copytree(run, target)
    config = json.loads((target / "config.json").read_text())
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    (target / "config.json").write_text(json.dumps(config))
    return target


CALL = "os:system('touch HERE/harm')"
KEYS = ("model", "augment", "mix", "loss", "optimizer", "schedule", "metrics", "tta", "data.source", "data.sampling")


@pytest.mark.parametrize("command", ["evaluate", *thorough("predict")])
@pytest.mark.parametrize(("key", "value"), [
    *((key, CALL) for key in KEYS), ("data.eval.test", f"{CALL}/test"), ("preprocess", f"decode(1)|{CALL}"),
    ("preprocess_eval", f"decode(1)|{CALL}"), ("model", f"mlp(activation={CALL!r})"),
    ("model", "resnet(norm='os:system')"),
])  # fmt: skip
def test_a_run_that_names_code(mistake, trained, tmp_path, command, key, value):
    """Whatever the key: nothing is imported. What would be is named."""
    run = changed(trained, tmp_path / "run", {key: value.replace("HERE", str(tmp_path))})
    (tmp_path / "a.png").write_bytes(b"")
    files = [tmp_path / "a.png"] if command == "predict" else []
    unused = {"predict": ("mix", "metrics", "data.source", "data.eval.test", "data.sampling")}
    if key in unused.get(command, ("mix", "data.sampling")):
        launch.main([command, *map(str, files), f"--workdir={run}"])
    else:
        sentence = mistake(command, *files, f"--workdir={run}", log=r"^\d\d:\d\d:\d\d")
        assert has(sentence, f"the run in {run} names", "'os:system'", "import the module 'os'", "add --trust")
    assert not (tmp_path / "harm").exists()


_watched: list[str] | None = None


def _watch(event, arguments):
    if _watched is not None and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        _watched.append(f"{event} {arguments}")
        raise AssertionError(_watched[-1])


@pytest.fixture
def offline():
    """Any attempt of Python to reach the network fails, and fails the test, whoever catches its error."""
    global _watched
    sys.addaudithook(_watch)  # which stays
    _watched = []
    yield
    seen, _watched = _watched, None
    assert seen == []


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("changes", "named"), [
    ({"init_from": "gs://evil/weights.pth"}, "'gs://evil/weights.pth', which is on the network"),
    ({"data.source": "arrays('s3://evil/x.npz')"}, "'s3://evil/x.npz', which is on the network"),
    ({"data.eval.test": "arrays('s3://evil/x.npz')/test"}, "'s3://evil/x.npz', which is on the network"),
    ({"data.source": "tfds('mnist')", "data.data_dir": "gs://evil/x"}, "'gs://evil/x', which is on the network"),
    ({"data.source": "tfds('mnist', data_dir='s3://evil/x')"}, "'s3://evil/x', which is on the network"),
    ({"data.source": "tfds('mnist', data_dir='HERE')"}, "TFDS data set 'mnist', which is not prepared on this machine"),
    ({"data.source": "tfds('someone:digits')"}, "data set 'someone:digits', for which TFDS would fetch a program"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["reproduce", "bundle", "evaluate"])
def test_a_run_that_names_a_place_on_the_network(mistake, trained, tmp_path, command, changes, named):
    """Of a work directory or a bundle: nothing is looked up, and nothing is fetched."""
    here = {key: value.replace("HERE", str(tmp_path)) for key, value in changes.items()}
    run = changed(trained, tmp_path / "run", here)
    argv = [command, f"--workdir={run}"]
    if command in ("reproduce", "bundle"):
        argv = ["reproduce", f"--output={tmp_path}/again", run]
    if command == "bundle":
        Record.load(str(run)).pack(tmp_path / "b.zip")
        argv[-1] = tmp_path / "b.zip"
    if command == "evaluate" and "init_from" in changes:  # a trained model starts from its checkpoint
        assert launch.main(argv) == 0
        return
    sentence = mistake(*argv, log=r"^\d\d:\d\d:\d\d")
    assert has(sentence, f"the run in {argv[-1] if 'zip' in str(argv[-1]) else run} names", named, "add --trust")


@pytest.mark.parametrize("model", ["my_trusted_nets:Net(widths=(512,))",
                                   "mlp(widths=(512,), activation='my_trusted_nets:relu')"])  # fmt: skip
def test_trusted(trained, tmp_path, monkeypatch, capsys, model):
    """With --trust it is imported, from the folder of the config or the current one."""
    run = changed(trained, tmp_path / "run", {"model": model})
    code = "from jax.nn import relu\n\nfrom imgclf_jax.models.backbones import MLP as Net\n"
    (tmp_path / "my_trusted_nets.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert launch.main(["evaluate", f"--workdir={run}", "--trust"]) == 0
    assert "test: examples 64" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["the current folder", *thorough("the folder of the config")])
def test_a_file_that_is_called_like_a_library(tmp_path, place):
    """What is installed comes first."""
    for name in ("optax", "jax", "absl", "ml_collections", "os"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "mine.py").write_text((ROOT / "configs" / "digits.py").read_text())
    config = [f"--config={tmp_path}/mine.py"] if place == "the folder of the config" else []
    where = ROOT if config else tmp_path
    command = [sys.executable, str(ROOT / "launch.py"), *config, f"--workdir={tmp_path}/run", "--config.model=none"]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("error: unknown model 'none'")


@pytest.mark.parametrize(("program", "words"), [
    ([str(ROOT / "launch.py")], ["probe"]),
    *thorough(([str(ROOT / "launch.py")], ["export", "x.onnx"])),
    (["-m", "imgclf_jax"], ["evaluate"]),
])  # fmt: skip
def test_no_file_of_the_current_folder_stands_in_for_a_package(trained, tmp_path, program, words):
    """Packages look for optional ones, and commands for extras: a missing one was found in a stranger's run."""
    run = shutil.copytree(trained, tmp_path / "run")
    for name in ("matplotlib", "jax2onnx", "pandas", "jax_plugins/evil", "defusedxml", "jax"):
        (run / name).mkdir(parents=True)
        (run / name / "__init__.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w').close()\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *program, *words, "--workdir=."], cwd=run, env=environment, check=False)
    assert not (tmp_path / "harm").exists()

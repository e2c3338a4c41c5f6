"""A stranger's run, bundle or folder runs none of their code, and no command changes or waits for what is outside."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cases import thorough
from PIL import Image
from test_mistakes import FAKE, ROOT, has, mistake, snapshot  # noqa: F401  fixtures

import launch
from imgclf_jax.core import paths
from imgclf_jax.data import image_files
from imgclf_jax.run.checkpoint import Checkpoints
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
        functools.reduce(dict.__getitem__, parents, config)[leaf] = value
    (target / "config.json").write_text(json.dumps(config))
    return target


CALL = "os:system('touch HERE/harm')"
KEYS = ("model", "augment", "mix", "loss", "optimizer", "schedule", "metrics", "tta", "data.source", "data.sampling")


@pytest.mark.parametrize("command", ["evaluate", *thorough("predict", "report")])
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
    ({"init_from": "timm('resnet18.tv_in1k')"}, "'hf-hub:timm/resnet18.tv_in1k', which is on the network"),
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
                                   *thorough("mlp(widths=(512,), activation='my_trusted_nets:relu')")])  # fmt: skip
def test_trusted(trained, tmp_path, monkeypatch, printed, model):
    """With --trust it is imported, from the folder of the config or the current one."""
    run = changed(trained, tmp_path / "run", {"model": model})
    code = "from jax.nn import relu\n\nfrom imgclf_jax.models.backbones import MLP as Net\n"
    (tmp_path / "my_trusted_nets.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert "test: examples 64" in printed("evaluate", f"--workdir={run}", "--trust")


@pytest.mark.parametrize("place", ["the current folder", *thorough("the folder of the config")])
def test_a_file_that_is_called_like_a_library(tmp_path, place):
    for name in ("optax", "jax", "absl", "ml_collections", "os"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "mine.py").write_text((ROOT / "configs" / "digits.py").read_text())
    config = [f"--config={tmp_path}/mine.py"] if place == "the folder of the config" else []
    where = ROOT if config else tmp_path
    command = [sys.executable, str(ROOT / "launch.py"), *config, f"--workdir={tmp_path}/run", "--config.model=none"]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("error: unknown model 'none'")


@pytest.mark.parametrize(("program", "words"), [
    *thorough(([str(ROOT / "launch.py")], ["probe"]), ([str(ROOT / "launch.py")], ["export", "x.onnx"])),
    (["-m", "imgclf_jax"], ["evaluate"]),
])  # fmt: skip
def test_no_file_of_the_current_folder_stands_in_for_a_package(trained, tmp_path, program, words):
    run = shutil.copytree(trained, tmp_path / "run")
    for name in ("matplotlib", "jax2onnx", "pandas", "jax_plugins/evil", "defusedxml", "jax"):
        (run / name).mkdir(parents=True)
        (run / name / "__init__.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w').close()\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *program, *words, "--workdir=."], cwd=run, env=environment, check=False)
    assert not (tmp_path / "harm").exists()


@pytest.fixture
def home(tmp_path) -> Path:
    """What belongs to the person."""
    home = tmp_path / "home"
    (home / "8").mkdir(parents=True)
    (home / "notes.txt").write_text("mine\n")
    (home / "8" / "photo.png").write_bytes(b"mine")
    return home


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


OBSTACLES = {
    "a link to a file": lambda path, home: path.symlink_to(home / "notes.txt"),
    "a link to a folder": lambda path, home: path.symlink_to(home),
    "a link to nothing": lambda path, home: path.symlink_to(home / "made.txt"),
    "a hard link": lambda path, home: os.link(home / "notes.txt", path),
    "a pipe": lambda path, home: os.mkfifo(path),
}
MORE = thorough("a link to nothing", "a hard link")


def put(obstacle, path: Path, home: Path) -> None:
    """In place of what has the name."""
    paths.remove(path)
    path.parent.mkdir(exist_ok=True)
    OBSTACLES[obstacle](path, home)


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_file_is_replaced_and_nothing_is_written_through_it(tmp_path, home, obstacle):
    before, path = snapshot(home), tmp_path / "report.html"
    for name in ("report.html", ".report.html.tmp"):
        put(obstacle, tmp_path / name, home)
    paths.write_atomically(path, "new")
    assert path.read_text() == "new"
    assert not path.is_symlink()
    assert snapshot(home) == before
    put(obstacle, path, home)
    with pytest.raises(OSError, match=r"report.html' is a link, folder, pipe or device|exists"):
        paths.open_regular(path, "a", "utf-8")
    assert snapshot(home) == before


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("pipe", "link", "socket", ".", "/dev/zero"):
            with pytest.raises(OSError, match="is a folder, pipe or device"):
                paths.read(tmp_path / name)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link to a file").symlink_to("file")
    assert paths.read(tmp_path / "link to a file") == b"x"


COMMANDS = {
    ".report.html.tmp": ("report",), "report.html": ("report",),
    ".predictions.npz.tmp": ("compare", "--test"), "predictions.npz": ("compare", "--test"),
    ".batch-0.png.tmp": ("show-batch",), "batch-0.png": ("show-batch",),
    "lock": ("status",), "provenance.json": ("status",), "result.json": ("status",), "metrics.jsonl": ("status",),
    "checkpoints/12/metrics/metrics": ("evaluate",), "checkpoints/12/manifest.json": ("evaluate",),
    "checkpoints/12/_CHECKPOINT_METADATA": ("evaluate",), "checkpoints/12/default/manifest.ocdbt": ("evaluate",),
    "checkpoints/12": ("evaluate",), "checkpoints": ("evaluate",), "config.json": ("evaluate",),
    "digests.jsonl": ("reproduce",),
}  # fmt: skip


@pytest.mark.parametrize("obstacle", ["a link to a file", "a pipe", *thorough("a link to a folder"), *MORE])
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_on_a_strangers_run(run, home, tmp_path, name, obstacle):
    before = snapshot(home)
    put(obstacle, run / name, home)
    command, *flags = COMMANDS[name]
    output = ["--output", str(tmp_path / "again")] if command == "reproduce" else []
    files = [run] if command in ("compare", "status", "reproduce") else [f"--workdir={run}"]
    launch.main([command, *flags, *map(str, files), *output])
    assert snapshot(home) == before


WRITTEN = ("config.json", "provenance.json", "metrics.jsonl", "digests.jsonl", "result.json", "parameters.txt")
FOLDERS = ("tb", "checkpoints", "damaged", "checkpoints/8", "checkpoints/removed-8", "checkpoints/replaced-8",
           "checkpoints/16.orbax-checkpoint-tmp-0")  # fmt: skip


@pytest.mark.parametrize("name", [*WRITTEN, *FOLDERS, "lock"])
@pytest.mark.parametrize("obstacle", ["a link to a folder", *thorough("a link to a file", "a pipe"), *MORE])
def test_training_goes_on_in_a_strangers_run(run, home, name, obstacle):
    """A flipped bit in the last checkpoint moves it to `damaged/`, and whatever lies there by its step is removed."""
    before = snapshot(home)
    shutil.copytree(run / "checkpoints" / "12", run / "checkpoints" / "8", dirs_exist_ok=True)
    data = max((run / "checkpoints" / "12").rglob("d/*"), key=lambda file: file.stat().st_size)
    data.write_bytes(bytes(100) + data.read_bytes()[100:])
    put(obstacle, run / name, home)
    launch.main([f"--workdir={run}", *FAKE])
    assert snapshot(home) == before


def test_the_lock_is_no_link(mistake, run, home):
    for obstacle in OBSTACLES:
        put(obstacle, run / "lock", home)
        sentence = mistake(f"--workdir={run}", *FAKE, log=r"^\d\d:\d\d:\d\d")
        assert has(sentence, f"work directory {run} cannot be written: 'lock' is a link, folder, pipe or device")


def test_a_name_like_that_of_a_checkpoint_removes_no_other_folder(run):
    for name in ("replaced-..", "replaced-"):
        (run / "checkpoints" / name).mkdir()
    before = snapshot(run)
    Checkpoints(run / "checkpoints").close()
    assert snapshot(run) == before


def test_a_directory_is_entered_once(tmp_path):
    """Eleven folders with links to each other, and to the root: 11! paths."""
    for i in range(11):
        (tmp_path / f"d{i}").mkdir()
        Image.new("L", (2, 2)).save(tmp_path / f"d{i}" / "a.png")
        for j in range(11):
            (tmp_path / f"d{i}" / f"to{j}").symlink_to(tmp_path / f"d{j}")
        (tmp_path / f"d{i}" / "root").symlink_to("/")
    images = image_files.walk(tmp_path)
    assert sorted(name.count("/") for name in images) == list(range(1, 12))

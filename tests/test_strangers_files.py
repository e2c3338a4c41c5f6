"""A stranger's run, bundle or folder: no command writes, moves, removes or waits for anything outside of it."""

import os
import shutil
import socket
from pathlib import Path

import pytest
from cases import thorough
from PIL import Image
from test_mistakes import FAKE, has, mistake, snapshot  # noqa: F401  fixtures
from test_trust import trained  # noqa: F401  a fixture

import launch
from imgclf_jax.core import paths
from imgclf_jax.data import image_files
from imgclf_jax.run.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("one_device")


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
    """`replaced-..` was put back in place of the work directory."""
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

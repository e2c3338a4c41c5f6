"""Every Python block, and every command of launch.py, of the README and of `docs/` runs.

Commands run in a folder with a few images, with small data and few steps. Of other commands the files are there.
"""

import contextlib
import io
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import launch
from imgclf_jax.core import spec

ROOT = Path(__file__).parent.parent
PAGES = {page.stem: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
# What else the pages run: CI and the contributor do.
OTHERS = {"python", "python3", ".uv/bin/pip", ".uv/bin/uv", "uvx", "export", "bash", "ruff", "mypy", "pytest",
          "sphinx-build", "tensorboard"}  # fmt: skip
TINY = {"total": "2 steps", "batch_size": "8", "schedule": "constant(1e-3)", "log_every": "", "eval_every": "",
        "checkpoint_every": "", "tensorboard": "False"}  # fmt: skip
SMALL = {"model": "mlp(widths=(4,))", "data.source": "fake(16, (28, 28, 1), 4)"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each Python and Bash block."""
    return re.findall(r"^```(python|bash)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def split(line: str) -> list[list[str]]:
    groups = itertools.groupby(shlex.split(line, comments=True), lambda word: word == "&&")
    return [without_uv(list(words)) for between, words in groups if not between]


def without_uv(words: list[str]) -> list[str]:
    if words[0] in ("uv", ".uv/bin/uv") and words[1] == "run":
        words = words[2:]
        while words[0] in ("--group", "--no-group", "--extra", "--isolated"):
            assert words[0] == "--isolated" or words[1] in GROUPS
            words = words[1 if words[0] == "--isolated" else 2 :]
    return words


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GROUPS = {*PROJECT["dependency-groups"], *PROJECT["project"]["optional-dependencies"]}


def run_launch(words: list[str]) -> None:
    """A command of launch.py in this process; training takes two steps of a small network unless one is named."""
    command = words.pop(0) if words and not words[0].startswith("-") else "train"
    if command == "--help" or words == ["--help"]:
        assert launch.main(["--help"]) == 0
        return
    if command == "dryrun":
        run_dryrun(words)
        return
    if command == "sweep":
        run_launch(first_run(words))
        return
    config = next((b for a, b in itertools.pairwise(words) if a == "--config"), "configs/digits.py")
    settings = dict(TINY) if command == "train" else {}
    if command == "reproduce":  # the runs here have no more than two steps
        words = [word for word in words if not word.startswith("--steps=")]
    if ("--config" in words and any(word.startswith("--config.init_from=") for word in words)) or "transfer" in config:
        settings |= {"model": "resnet_cifar(depth=8)", "batch_size": "8", "data.source": "fake(16, (32, 32, 3), 10)"}
    elif command == "train" and config.startswith("configs/"):
        settings |= SMALL
    elif command == "find-lr":
        settings |= {"model": "mlp(widths=(32,))"}
    if ":PHOTOS" in config:
        settings.pop("data.source", None)
    if any(word.startswith("--profile") for word in words):
        settings["total"] = "12 steps"
    downloads = [word for word in words if word.startswith("--config.data.source=tfds")]
    for word in downloads:
        spec.parse_one(word.partition("=")[2])
    kept = [word for word in words if word not in downloads]
    small = [f"--config.{key}={value}" for key, value in settings.items()]
    assert launch.main([command, *small, *kept]) == 0


def first_run(words: list[str]) -> list[str]:
    """The command line of the first run of a sweep, `words`, as a page would have it: without what makes it long."""
    words, out = words[: words.index(">")] if ">" in words else words, io.StringIO()
    with contextlib.redirect_stdout(out):
        assert launch.main(["sweep", *words, *([] if "--print" in words else ["--print"])]) == 0
    _, script, *command = shlex.split(out.getvalue().splitlines()[0])
    assert script.endswith("launch.py")
    config = next(word.removeprefix("--config=") for word in command if word.startswith("--config="))
    named = ["--config", f"configs/{Path(config).name}"] if "configs/" in config else [f"--config={config}"]
    return [word for word in command if not word.startswith(("--config=", "--config.total="))] + named


def run_dryrun(words: list[str]) -> None:
    """In a separate process, which sets its platform, for virtual devices, since no compiler of a chip is installed."""
    from imgclf_jax.tools.dryrun import topology

    [chips] = [word.removeprefix("--chips=") for word in words if word.startswith("--chips=")]
    topology.parse(chips)
    if chips.startswith("cpu"):
        command = [sys.executable, "launch.py", "dryrun", "--config.model=mlp", *words]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)


def run_other(words: list[str]) -> None:
    """A Python file that the page has written, or a file and extras of the clone."""
    if words[0] == "python" and words[1].startswith("make_"):
        subprocess.run([sys.executable, *words[1:]], check=True)
        return
    assert words[0] in OTHERS or (ROOT / words[0]).is_file(), words
    assert [w for w in words if w.startswith(("tests/", "benchmarks/")) and not (ROOT / w).exists()] == []


LONG = {"data", "extending", "models", "using"}  # pages of many commands
QUICK = {"config", "contributing", "reliability", "speed"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of the pages (images, arrays, weights) and the working directory."""
    rng = np.random.default_rng(0)
    for place in ("PHOTOS", "DIR/train", "DIR/test"):
        for name in ("cat", "dog"):
            (tmp_path / place / name).mkdir(parents=True)
            for i in range(10):
                picture = Image.fromarray(rng.integers(256, size=(40, 44, 3), dtype=np.uint8))
                picture.save(tmp_path / place / name / f"{i}.png")
    (tmp_path / "more").mkdir()
    for name in ("new.jpg", "more/other.jpg"):
        picture.resize((32, 32)).save(tmp_path / name)
    arrays = {"x": rng.integers(256, size=(16, 28, 28), dtype=np.uint8), "y": np.arange(16) % 4}
    np.savez(tmp_path / "mnist.npz", **{f"{a}_{split}": x for split in ("train", "test") for a, x in arrays.items()})
    for name in ("configs", "launch.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:  # the files of one page are not those of another
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.fixture
def weights(folder, monkeypatch):
    """ResNet-8's weights under the file name of the pages."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "weights"))
    import torch_format
    from test_torch_names import MODELS
    from torch_fixtures import draw

    shapes = MODELS["akamaster resnet20"]["shapes"]
    own = {name: shape for name, shape in shapes.items() if not name.startswith("layer") or name.split(".")[1] == "0"}
    torch_format.save(folder / "resnet20-12fca82f.th", {name: draw(name, tuple(shape)) for name, shape in own.items()})


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow if name in LONG else pytest.mark.thorough)
    for name, page in PAGES.items() if blocks(page)
])  # fmt: skip
def test_the_blocks_of_a_page_run(name, folder, weights, capsys):
    for language, text in blocks(PAGES[name]):
        if language == "python":
            file = re.match(r"# (\w+\.py)\n", text)
            if file:
                (folder / file[1]).write_text(text)
            else:
                exec(compile(text, str(PAGES[name]), "exec"), {})
            continue
        for words in [words for line in text.splitlines() for words in split(line)]:
            if words[0] == "launch.py":
                run_launch(words[1:])
            else:
                run_other(words)


def test_the_tests_that_reliability_names_are_there():
    named = re.findall(r"`([\w/]*test_\w+\.py)`", PAGES["reliability"].read_text())
    assert len(named) > 20
    assert [file for file in named if not (ROOT / "tests" / file).is_file()] == []


def test_the_commands_for_clusters_are_valid(monkeypatch, capsys):
    """Each launch.py command of the page parses, with its config."""
    monkeypatch.chdir(ROOT)
    page = PAGES["clusters"].read_text()
    text = page.replace("\\\n", " ").replace("$OMPI_COMM_WORLD_SIZE", "2").replace("$OMPI_COMM_WORLD_RANK", "0")
    found = [shlex.split(line.rstrip("'")) for line in re.findall(r"launch\.py (train .*)", text)]
    assert len(found) == 6
    monkeypatch.setattr("imgclf_jax.cli.main._dispatch", lambda *parsed: 0)
    for words in found:
        assert launch.main(words) == 0, words

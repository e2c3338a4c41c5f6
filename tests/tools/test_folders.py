"""A folder of photographs through the commands: its splits, and its unreadable files."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import launch
from imgclf_jax import config as configs
from imgclf_jax.core.text import escape_surrogates, printable

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "folder.py"
TINY = ("--config.model=mlp(widths=(4,))", "--config.preprocess=decode(3)|resize(8)", "--config.preprocess_eval=",
        "--config.batch_size=8", "--config.total=2 steps", "--config.tensorboard=False",
        "--config.schedule=constant(1e-3)")  # fmt: skip


def photos(root: Path, *places: str, count: int = 6) -> Path:
    """Writes `count` noise images of each class into each folder."""
    rng = np.random.default_rng(0)
    for place in places or (".",):
        for name in ("cat", "dog"):
            (root / place / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(root / place / name / f"{i}.png")
    return root


@pytest.mark.parametrize(("places", "train", "evals"), [
    ([], "train[:80%]", {"val": "train[80%:90%]", "test": "train[90%:]"}),
    (["train"], "train[:80%]", {"val": "train[80%:90%]", "test": "train[90%:]"}),
    (["train", "val", "test"], "train", {"val": "val", "test": "test"}),
    (["train", "validation"], "train", {"val": "validation"}),
    (["train", "test"], "train[:90%]", {"val": "train[90%:]", "test": "test"}),
    (["Training", "Testing"], "Training[:90%]", {"val": "Training[90%:]", "test": "Testing"}),
])  # fmt: skip
def test_the_config_follows_the_splits_that_there_are(tmp_path, places, train, evals):
    """The best checkpoint is by `val`, held out of the training images if needed, and never by `test`."""
    photos(tmp_path, *places, count=1)
    config = configs.load_file(f"{CONFIG}:{tmp_path}")
    assert (config.data.train, config.data.eval.to_dict()) == (train, evals)
    assert config.checkpoint.best == "val/accuracy"


@pytest.mark.thorough
def test_unreadable_files_are_left_out_by_every_command(tmp_path, capsys, printed):
    root = photos(tmp_path / "p")
    bad = [root / "cat" / "0.png", root / "dog" / "5.png"]
    for file in bad:
        file.write_bytes(file.read_bytes()[:100])
    argv = [f"--workdir={tmp_path / 'run'}", f"--config={CONFIG}:{root}", *TINY, "--config.data.train=train",
            "--config.data.eval.test=train", "--config.data.eval.val=train"]  # fmt: skip
    assert launch.main(argv) == 1
    assert all(str(file) in capsys.readouterr().err for file in bad[:1])
    assert launch.main([*argv, "--config.data.unreadable=skip"]) == 0
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert record["unreadable"] == [str(file) for file in bad]
    assert record["data"]["train_examples"] == 10
    err = " ".join(capsys.readouterr().err.split())
    for said in ("unreadable files left out: 2, such as ", "training on train (10) evaluating on test = train (10)"):
        assert err.count(said) == 1

    assert json.loads(printed("evaluate", f"--workdir={tmp_path / 'run'}", "--format=json"))["test"]["examples"] == 10

    assert launch.main(["predict", f"--workdir={tmp_path / 'run'}", "--format=json", str(root)]) == 1
    records = json.loads(capsys.readouterr().out)
    assert [r["file"] for r in records if "error" in r] == [str(file) for file in bad]


NASTY = ["é漢", "a\x1b[31mb", "n\nl", os.fsdecode(b"\xff")]


@pytest.mark.thorough
def test_names_that_hold_anything(tmp_path, capsys):
    """Tables and errors show one line per name, without control characters; JSON has each name exactly."""
    for name in NASTY:
        (tmp_path / "p" / name).mkdir(parents=True)
        for file in NASTY:
            Image.new("RGB", (8, 8)).save(tmp_path / "p" / name / f"{file}.png")
    run = f"--workdir={tmp_path / 'run'}"
    whole = ("--config.data.train=train", "--config.data.eval.test=train", "--config.data.eval.val=train")
    assert launch.main([f"--config={CONFIG}:{tmp_path / 'p'}", run, *TINY, *whole]) == 0
    names = sorted(NASTY)
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["data"]["class_names"] == names

    def rows():
        out, err = capsys.readouterr()
        assert all(line.isprintable() for line in (out + err).splitlines())
        return [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line[0] == "│"]

    capsys.readouterr()
    assert launch.main(["evaluate", run]) == 0
    classes = [row for row in rows() if len(row) == 5]  # of the second table; the first one is of scores
    assert [row[0] for row in classes] == [printable(name) for name in names] * 2  # of two sets
    assert launch.main(["predict", run, str(tmp_path / "p")]) == 0
    files = [str(tmp_path / "p" / name / f"{file}.png") for name in names for file in sorted(NASTY)]
    found = rows()
    assert [row[0] for row in found] == [printable(file) for file in files]
    assert {row[1].rpartition(" ")[0] for row in found} <= set(map(printable, names))
    assert launch.main(["predict", run, str(tmp_path / "p"), "--format=json"]) == 0
    assert [record["file"] for record in json.loads(capsys.readouterr().out)] == files
    for file in files:
        Path(file).write_bytes(b"")
    assert launch.main(["predict", run, str(tmp_path / "p")]) == 1
    rows()
    exported = [str(tmp_path / f"e.{kind}") for kind in ("stablehlo", "savedmodel", "safetensors")]
    assert launch.main(["export", *exported, run]) == 0
    described = zipfile.ZipFile(exported[0]).read("metadata.json")
    assert json.loads(described)["class_names"] == list(map(escape_surrogates, names))

"""`launch.py predict` agrees with evaluation on the same images; the images on a command line."""

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import launch
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources
from imgclf_jax.data.source import read_examples
from imgclf_jax.models import classifier
from imgclf_jax.tools.pages import inputs

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[3]
COUNT = 100


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The work directory of the default config, trained briefly."""
    workdir = tmp_path_factory.mktemp("digits") / "run"
    assert launch.main(["--config.total=8 epochs", "--config.model=mlp(widths=(32,))", f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def pngs(tmp_path_factory) -> Path:
    """The first test digits, one PNG each."""
    folder = tmp_path_factory.mktemp("pngs")
    for i, image in enumerate(examples()["image"]):
        Image.fromarray(image[..., 0]).save(folder / f"{i:03d}.png")
    return folder


def examples() -> dict:
    return read_examples(sources.digits()["test"], np.arange(COUNT))


@pytest.fixture
def predict(capsys):
    """Runs `predict` and returns (exit status, stdout, stderr)."""

    def run(workdir: Path, *argv) -> tuple[int, str, str]:
        capsys.readouterr()
        status = launch.main(["predict", f"--workdir={workdir}", *map(str, argv)])
        return status, *capsys.readouterr()

    return run


def classes(out: str) -> dict[str, str]:
    """File name → the class predicted for it, from the JSON output."""
    return {Path(r["file"]).name: r["predictions"][0]["class"] for r in json.loads(out) if "predictions" in r}


def test_agrees_with_evaluation(digits, pngs, predict, printed):
    """The same predicted classes as `evaluate` on these images, counted by (true, predicted), in batches of 128."""
    status, out, _ = predict(digits, pngs, pngs, "--format=json")
    records = json.loads(out)
    assert (status, records[:COUNT]) == (0, records[COUNT:])
    assert [Path(r["file"]).name for r in records[:COUNT]] == [f"{i:03d}.png" for i in range(COUNT)]
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (examples()["label"], np.array(list(classes(out).values()), int)), 1)
    argv = ["evaluate", f"--workdir={digits}", f"--config.data.eval.first=test[:{COUNT}]", "--format=json"]
    first = json.loads(printed(*argv))["first"]
    assert (first["examples"], first["confusion"]) == (COUNT, confusion.tolist())
    assert 0.9 < first["accuracy"] < 1  # so that being equal says something


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Six images, a text file and a broken image, in the working directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b/1.png", "b/2.jpg", "b/c/1.png", "b.png", "[d].png"):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        Image.fromarray(rng.integers(256, size=(9, 9), dtype=np.uint8)).save(name)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path


def test_files_directories_and_patterns(photos):
    """In the order given, and within each sorted by name, folder by folder."""
    inside = ["b/1.png", "b/2.jpg", "b/c/1.png"]
    assert inputs.find(["b.png", "b", "a.png"]) == ["b.png", *inside, "a.png"]
    assert inputs.find(["**/1.png"]) == ["b/1.png", "b/c/1.png"]
    assert inputs.find(["*.png"]) == ["[d].png", "a.png", "b.png", "broken.png"]
    assert inputs.find(["[d].png"]) == ["[d].png"]  # what is there is no pattern
    for word, message in [("x.png", "no file or directory"), ("x*.png", "has no images"), ("b/*/", "has no images")]:
        with pytest.raises(UserError, match=message):
            inputs.check(["a.png", word])
    with pytest.raises(UserError, match="name at least one image"):
        inputs.find([])


@pytest.mark.thorough
def test_every_format_says_the_same(digits, photos, predict, monkeypatch):
    """Files in one order, with the same classes and probabilities; a missing one of standard input is its own error."""
    (photos / ".hidden.png").write_bytes((photos / "a.png").read_bytes())
    words = [".", "--top_k=2"]
    status, out, _ = predict(digits, "--format=json", *words)
    assert status == 1  # for the broken one, which is named
    assert "error: ./broken.png: " in predict(digits, *words)[2]
    records = json.loads(out)
    assert [record["file"] for record in records] == [
        "./[d].png", "./a.png", "./b/1.png", "./b/2.jpg", "./b/c/1.png", "./b.png", "./broken.png"]  # fmt: skip
    _, out, _ = predict(digits, "--format=jsonl", *words)
    assert [json.loads(line) for line in out.splitlines()] == records

    _, out, _ = predict(digits, "--format=csv", *words)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["file", "error", "class_1", "probability_1", "class_2", "probability_2"]
    for row, record in zip(rows, records, strict=True):
        assert (row["file"], row["error"]) == (record["file"], record.get("error", ""))
        for rank, p in enumerate(record.get("predictions", []), 1):
            assert (row[f"class_{rank}"], float(row[f"probability_{rank}"])) == (p["class"], p["probability"])

    _, out, _ = predict(digits, *words)
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if "│" in line]
    assert lines == [[r["file"], *(f"{p['class']} {p['probability']:.4f}" for p in r["predictions"])]
                     for r in records if "predictions" in r]  # fmt: skip

    monkeypatch.setattr(sys, "stdin", io.StringIO("a.png\n\nnothing.png\nb/2.jpg\n"))
    status, out, err = predict(digits, "--format=jsonl", "-")
    records = [json.loads(line) for line in out.splitlines()]
    assert [(record["file"], "error" in record) for record in records] == [
        ("a.png", False), ("nothing.png", True), ("b/2.jpg", False)]  # fmt: skip
    assert "error: nothing.png: No such file or directory" in err


def test_an_image_of_which_the_model_makes_nan_costs_no_other_its_row(digits, pngs, predict, monkeypatch, tmp_path):
    for name, image in (("a", Image.open(pngs / "000.png")), ("b", Image.new("L", (8, 8), 255))):
        image.save(tmp_path / f"{name}.png")

    def overflowing(self, variables, x, train):
        return jnp.where(x.min((1, 2, 3)) == 1, jnp.inf, 0.0)[:, None] * jnp.ones(10)

    monkeypatch.setattr(classifier.Classifier, "apply", overflowing)
    status, out, err = predict(digits, tmp_path, "--format=json")
    assert [[*record] for record in json.loads(out)] == [["file", "predictions"], ["file", "error"]]
    assert "b.png: the model gives NaN or infinite values for this image" in err
    assert (status, err.splitlines()[-1]) == (1, "error: 1 of 2 images failed")


@pytest.mark.thorough
def test_the_work_directory_is_enough(predict, tmp_path, monkeypatch):
    """It needs neither data, config file nor the directory's name: class names and host ops are recorded."""
    rng = np.random.default_rng(0)
    for name, colour in [("grün", (0, 200, 0)), ("rouge", (220, 0, 0))]:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(24):
            noise = rng.integers(0, 30, (20, 24, 3), np.uint8)
            Image.fromarray(noise + np.array(colour, np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    shutil.copy(ROOT / "configs" / "folder.py", tmp_path / "mine.py")
    argv = (f"--config={tmp_path / 'mine.py'}:{tmp_path / 'data'}", "--config.model=mlp(widths=(8,))",
            "--config.schedule=constant(1e-2)", "--config.batch_size=16", "--config.total=30 steps")  # fmt: skip
    assert launch.main([*argv, f"--workdir={tmp_path / 'run'}"]) == 0
    for i, name in enumerate(("grün", "rouge")):
        shutil.copy(tmp_path / "data" / name / "0.png", tmp_path / f"{i}.png")
    Image.open(tmp_path / "0.png").resize((300, 100)).save(tmp_path / "2.png")  # of any size
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "mine.py").unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    status, out, _ = predict("moved", "0.png", "1.png", "2.png", "--format=json")
    assert status == 0
    assert classes(out) == {"0.png": "grün", "1.png": "rouge", "2.png": "grün"}


def test_an_image_on_standard_input_is_no_list_of_names(pngs, monkeypatch):
    with (pngs / "000.png").open(encoding="utf-8", errors="surrogateescape") as image:
        monkeypatch.setattr(sys, "stdin", image)
        with pytest.raises(UserError, match=r"'-' reads one file name per line .*name the image"):
            inputs.find(["-"])

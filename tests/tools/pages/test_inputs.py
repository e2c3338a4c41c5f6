"""The images on a command line, and how `predict` prints its results."""

import csv
import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

import launch
from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.pages import inputs

FLAGS = ["--config.total=2 steps", "--config.model=mlp(widths=(8,))", "--config.schedule=constant(1e-2)",
         "--config.eval_every="]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("digits") / "run"
    assert launch.main([*FLAGS, f"--workdir={workdir}"]) == 0
    return workdir


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


def output(capsys, run, *words):
    capsys.readouterr()
    status = launch.main(["predict", f"--workdir={run}", *words])
    return status, capsys.readouterr()


@pytest.mark.thorough
def test_every_format_says_the_same(run, photos, capsys, monkeypatch):
    """json, jsonl, csv and the table: files in the same order, with the same classes and probabilities.

    A hidden file is not used, and a missing one of standard input is an error of its own.
    """
    (photos / ".hidden.png").write_bytes((photos / "a.png").read_bytes())
    words = [".", "--top_k=2"]
    status, (out, _) = output(capsys, run, "--format=json", *words)
    assert status == 1  # for the broken one
    records = json.loads(out)
    assert [record["file"] for record in records] == [
        "./[d].png", "./a.png", "./b/1.png", "./b/2.jpg", "./b/c/1.png", "./b.png", "./broken.png"]  # fmt: skip
    _, (out, _) = output(capsys, run, "--format=jsonl", *words)
    assert [json.loads(line) for line in out.splitlines()] == records

    _, (out, _) = output(capsys, run, "--format=csv", *words)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["file", "error", "class_1", "probability_1", "class_2", "probability_2"]
    for row, record in zip(rows, records, strict=True):
        assert (row["file"], row["error"]) == (record["file"], record.get("error", ""))
        for rank, p in enumerate(record.get("predictions", []), 1):
            assert (row[f"class_{rank}"], float(row[f"probability_{rank}"])) == (p["class"], p["probability"])

    _, (out, _) = output(capsys, run, *words)
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if "│" in line]
    assert lines == [[r["file"], *(f"{p['class']} {p['probability']:.4f}" for p in r["predictions"])]
                     for r in records if "predictions" in r]  # fmt: skip

    monkeypatch.setattr(sys, "stdin", io.StringIO("a.png\n\nnothing.png\nb/2.jpg\n"))
    status, (out, err) = output(capsys, run, "--format=jsonl", "-")
    records = [json.loads(line) for line in out.splitlines()]
    assert [(record["file"], "error" in record) for record in records] == [
        ("a.png", False), ("nothing.png", True), ("b/2.jpg", False)]  # fmt: skip
    assert "error: nothing.png: No such file or directory" in err


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_on_standard_input_is_no_list_of_names(monkeypatch, kind):
    """One sentence, which says what to write."""
    content = io.BytesIO()
    Image.new("RGB", (9, 9), (200, 10, 90)).save(content, kind)
    text = io.TextIOWrapper(io.BytesIO(content.getvalue()), "utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdin", text)
    with pytest.raises(UserError, match=r"'-' reads one file name per line .*name the image"):
        inputs.find(["-"])


def test_a_name_on_standard_input_that_is_not_utf8(tmp_path, monkeypatch):
    """Names the same file as on the command line."""
    name = os.fsdecode(b"caf\xe9.png")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a.png\n" + os.fsencode(name) + b"\n"), "utf-8"))
    assert inputs.find(["-", "-"]) == ["a.png", name]

"""`launch.py predict` agrees with evaluation on the same images."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tolerance import rounding

import launch
from imgclf_jax.data import decode, sources
from imgclf_jax.data.resizing import resize
from imgclf_jax.data.source import read_examples
from imgclf_jax.models import classifier
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.trained import restore

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


def test_agrees_with_evaluation(digits, pngs, predict, capsys):
    """The same predicted classes as `evaluate` on these images, counted by (true, predicted), in batches of 128."""
    status, out, _ = predict(digits, pngs, pngs, "--format=json")
    records = json.loads(out)
    assert (status, records[:COUNT]) == (0, records[COUNT:])
    assert [Path(r["file"]).name for r in records[:COUNT]] == [f"{i:03d}.png" for i in range(COUNT)]
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (examples()["label"], np.array(list(classes(out).values()), int)), 1)
    argv = ["evaluate", f"--workdir={digits}", f"--config.data.eval.first=test[:{COUNT}]", "--format=json"]
    assert launch.main(argv) == 0
    first = json.loads(capsys.readouterr().out)["first"]
    assert (first["examples"], first["confusion"]) == (COUNT, confusion.tolist())
    assert 0.9 < first["accuracy"] < 1  # so that being equal says something


def test_probabilities(digits, pngs, predict):
    """Those of the classifier on the same pixels, as far as they are printed."""
    _, out, _ = predict(digits, pngs, "--format=json", "--top_k=99")
    workdir = Workdir(digits)
    programs, state, _ = restore(workdir.load_config(), workdir, "latest")
    pixels = np.stack([resize(image, 28) for image in examples()["image"]])  # [b, 28, 28, 1]
    images = pixels.astype(np.float32) / np.float32(255)
    logits = np.asarray(jax.jit(programs.recipe.model.apply)({"params": state.params}, images), np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    depth = 28 * 28 + 32 + 4 + 10  # two dense layers, the softmax
    most = 0.5e-6 + rounding(depth) * np.abs(logits).max() / 2  # six digits; and the slope of a softmax is 1/2 at most
    for record, row in zip(json.loads(out), expected, strict=True):
        found = [(p["class"], p["probability"]) for p in record["predictions"]]
        assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
        assert dict(found) == pytest.approx({str(c): p for c, p in enumerate(row)}, abs=most)


def test_a_broken_image(digits, pngs, predict, tmp_path):
    """The error names it on stderr, the others are still classified, and the exit status is 1."""
    content = (pngs / "000.png").read_bytes()
    for name, some in [("a.png", content), ("b.png", content[:60]), ("c.jpg", b"hello"), ("d.png", content)]:
        (tmp_path / name).write_bytes(some)
    status, out, err = predict(digits, tmp_path, "--format=json")
    first, *_, last = json.loads(out)
    assert (status, first["predictions"]) == (1, last["predictions"])
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path}/b.png: the image does not decode" in errors[0]
    assert f"{tmp_path}/c.jpg: the image is in none of the formats" in errors[1]
    assert errors[2:] == ["error: 2 of 4 images failed"]


def test_what_fails_of_one_image_costs_no_other_its_row(digits, pngs, predict, monkeypatch, tmp_path):
    """Endless pixels, a failing host op, overflowing outputs: one sentence each, and a row for all others."""
    good, bright = np.asarray(Image.open(pngs / "000.png")), np.full((8, 8), 255, np.uint8)
    Image.fromarray(good).save(tmp_path / "a.png")
    Image.new("1", (1_100_000, 1)).save(tmp_path / "b.png")
    Image.fromarray(bright[:3]).save(tmp_path / "c.png")
    Image.fromarray(bright).save(tmp_path / "d.png")
    Image.fromarray(good).save(tmp_path / "e.png")

    def breaking(image, height):
        if len(image) == 3:
            raise OverflowError("signed integer is greater than maximum")
        return resize(image, height)

    def overflowing(self, variables, x, train):
        return jnp.where(x.min((1, 2, 3)) == 1, jnp.inf, 0.0)[:, None] * jnp.ones(10)

    monkeypatch.setitem(decode.HOST_OPS, "resize", breaking)
    monkeypatch.setattr(classifier.Classifier, "apply", overflowing)
    status, out, err = predict(digits, tmp_path, "--format=json")
    assert status == 1
    keys = [[*record] for record in json.loads(out)]
    assert keys == [["file", "predictions"], *[["file", "error"]] * 3, ["file", "predictions"]]
    assert "b.png: the image has 1 by 1,100,000 pixels, but a side may have 1,048,576; crop it" in err
    assert "c.png: preprocess='decode(1)|resize(28)' fails: OverflowError: signed integer is greater" in err
    assert "d.png: the model gives NaN or infinite values for this image" in err
    assert err.splitlines()[-1] == "error: 3 of 5 images failed"


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

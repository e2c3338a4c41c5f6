"""The page of a trained run holds what `evaluate` finds, and is one safe, well-formed file that refers to nothing."""

import base64
import csv
import io
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from html_page import Page
from PIL import Image

import launch
from imgclf_jax.augment.ops import to_pixels
from imgclf_jax.core.text import decimals
from imgclf_jax.tools.explain import attribution, heatmap
from imgclf_jax.tools.report import findings as report_findings
from imgclf_jax.trained import load

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.thorough]

NAMES = ("<script>alert(1)<", "a & 'b'", 'dog" onload="x')  # as folders may be called


def reported(workdir: Path, *flags: str) -> str:
    assert launch.main(["report", f"--workdir={workdir}", *flags]) == 0
    return (workdir / "report.html").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on small photographs, in folders with unkind names."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 14)):
        for i, name in enumerate(NAMES):
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = draw.integers(256, size=(9, 12, 3), dtype=np.uint8) // (1 + (i == 0))
                Image.fromarray(pixels).save(folder / split / name / f"{k}.png")
    config = [f"--config.data.source=folder({str(folder)!r})", "--config.preprocess=decode(3)|random_resized_crop(8)",
              "--config.augment=pad_crop(2)|normalize((0.5, 0.4, 0.3), 0.25)|random_erasing(0.9)",
              "--config.model=mlp(widths=(4,))", "--config.batch_size=9",
              "--config.total=24 steps", "--config.log_every=6 steps", "--config.eval_every=12 steps",
              "--config.schedule=constant(1e-2)"]  # fmt: skip
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert launch.main([f"--workdir={workdir}", *config]) == 0
    return workdir


@pytest.fixture(scope="module")
def text(trained) -> str:
    return reported(trained)


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


@pytest.fixture(scope="module")
def predictions(trained, tmp_path_factory) -> list[dict[str, str]]:
    """What `evaluate` writes of each example."""
    file = tmp_path_factory.mktemp("predictions") / "all.csv"
    assert launch.main(["evaluate", f"--workdir={trained}", f"--predictions={file}"]) == 0
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def test_its_numbers_are_those_of_evaluate(trained, page, printed):
    found = json.loads(printed("evaluate", f"--workdir={trained}", "--format=json"))["test"]
    rows = page.tables["Scores on test"][1:]
    assert rows == [[name, f"{of['value']:.4f}", f"{of['low']:.4f} to {of['high']:.4f}" if "low" in of else ""]
                    for name, of in found["scores"].items()]  # fmt: skip
    _, _, first, *rest = page.tables["Confusion matrix on test"]
    assert [first[1:], *rest] == [[name, *map(str, row)] for name, row in zip(NAMES, found["confusion"], strict=True)]
    assert f"run: test accuracy {found['accuracy']:.4f} (95 % interval: {rows[0][2]})" in page.text
    recalls = np.diag(found["confusion"]) / np.sum(found["confusion"], 1)
    assert [row[2] for row in page.tables["Recall and precision of each class on test"][1:]] == [
        f"{recall:.4f}" for recall in recalls]  # fmt: skip


def test_top_losses_are_those_of_a_loop(page, predictions):
    """By the negative log-likelihood of the label, whether the example is classified correctly or not."""

    def label_probability(row):
        return next(float(row[f"probability_{k}"]) for k in (1, 2, 3) if row[f"class_{k}"] == row["label"])

    ranked = sorted(predictions, key=label_probability)
    shown = [item for item in page.items if ", loss " in item]
    assert len(shown) == report_findings.TOP_LOSSES < len(predictions)
    for item, row in zip(shown, ranked, strict=False):
        p = label_probability(row)
        other = f"taken for {row['class_1']} ({decimals(float(row['probability_1']))})"
        own = "correct" if row["correct"] == "True" else other
        assert item.startswith(f"{row['label']} ({decimals(p)}), {own}, loss {-math.log(p):.3g}{row['example']}Right: ")
    assert any(", correct, loss" in item for item in shown)
    wrong = sum(row["correct"] == "False" for row in predictions)
    assert f"{wrong} of 42 examples are misclassified. These have the highest loss" in page.text


def test_the_reliability_diagram_has_the_bins_of_a_loop(page, predictions):
    bins = [[0, 0.0, 0] for _ in range(15)]
    for row in predictions:
        confidence = float(row["probability_1"])
        place = next(i for i in range(15) if confidence <= (i + 1) / 15)
        count, total, right = bins[place]
        bins[place] = [count + 1, total + confidence, right + (row["correct"] == "True")]
    assert [row[1:] for row in page.tables["Calibration on test"][1:]] == [
        [str(n), f"{total / n:.4f}", f"{right / n:.4f}"] if n else ["0", "", ""] for n, total, right in bins
    ]


def test_it_is_well_formed_and_refers_to_nothing(text, page):
    """Nothing is loaded, and names that are code are text; a screen reader gets a name for each picture and table."""
    assert (page.open, page.wrong) == ([], [])
    assert not re.search(r"url\(|@import|<link|<script|<iframe|onload=\"x\"|onclick", text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert re.match(r"data:image/png;base64,|#", attributes.get(name, "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    places = {attributes.get("id") for _, attributes in page.tags}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert {link.removeprefix("#") for link in links} <= places
    for name in NAMES:  # unchanged for who reads the page
        assert name in page.tables["Confusion matrix on test"][1]
        assert name not in text
    assert all(own["alt"] for tag, own in page.tags if tag == "img")
    assert len([tag for tag, _ in page.tags if tag == "table"]) == len(page.tables) == 6


def test_curves_and_origin(trained, page):
    charts = [item for item in page.items if ", loss " not in item]
    assert charts == ["loss", "accuracy", "learning rate", "gradient norm", "parameter norm",
                      "training images per second", "waiting for input, % of the time"]  # fmt: skip
    result = json.loads((trained / "result.json").read_text())
    provenance = json.loads((trained / "provenance.json").read_text())
    for fact in (result["params_sha256"], provenance["data"]["fingerprint"], provenance["started"]):
        assert fact in page.text
    assert ["batch_size", "9", "128"] in page.tables["Keys that differ from their defaults"]
    assert f"uv run launch.py evaluate --workdir={trained} --checkpoint=24" in page.text
    modules = page.tables["Parameters of the model"][1:]
    total = sum(x.size for x in jax.tree.leaves(load(trained).state.params))
    assert sum(int(row[1].replace(",", "")) for row in modules) == total
    flops = 2 * (8 * 8 * 3 * 4 + 4 * 3)  # two per multiply-add of the two layers
    assert f"{total:,} parameters, {flops / 1e6:.3g} MFLOPs for the forward pass" in page.text


@pytest.mark.parametrize(("text", "values", "expected"), [
    ("normalize(0.5, 0.25)", [-2, 0, 2], [0, 0.5, 1]), ("normalize((0.1,), (0.5,))", [-0.2, 1.8], [0, 1]),
    ("", [0, 0.25, 1], [0, 0.25, 1]), ("normalize(0.5, 0.25)|my_ops:own", [-4, 0, 4], [0, 0.5, 1]),
])  # fmt: skip
def test_pixels_are_those_before_normalization(text, values, expected):
    found = to_pixels(np.array(values, np.float32).reshape(1, -1, 1, 1), text)
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-6)


SEEDS = ("--config.data.source=fake(96, (6, 6, 1), 40)", "--config.preprocess=decode(1)", "--config.augment=",
         "--config.model=mlp(widths=(4,))", "--config.total=3 steps", "--config.batch_size=16", "--config.num_seeds=2",
         "--config.schedule=constant(1e-2)", "--config.eval_every=1 steps", "--config.log_every=1 steps")  # fmt: skip


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("report.html")))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_several_seeds_and_many_classes(tmp_path, printed, monkeypatch):
    """Scores, confusions and mistakes are the ensemble's, as the page says; 40 classes have no matrix."""
    monkeypatch.setattr("imgclf_jax.tools.report.sets._ROWS", 10)
    workdir = tmp_path / "run"
    assert launch.main([f"--workdir={workdir}", *SEEDS]) == 0
    page = Page(reported(workdir))
    found = json.loads(printed("evaluate", f"--workdir={workdir}", "--format=json"))["test"]
    assert page.tables["Metrics on test"][1:] == [
        [name, *(f"{found[key]:.4f}" for key in (name, f"{name}_std", f"ensemble_{name}"))]
        for name in ("accuracy", "loss", "nll", "top5")
    ]
    assert page.tables["Scores on test"][1][1] == f"{found['ensemble_accuracy']:.4f}"
    assert "Everything below describes the ensemble" in page.text
    assert "Confusion matrix on test" not in page.tables
    recalls = [row[i] / sum(row) for i, row in enumerate(found["confusion"]) if any(row)]
    shown = page.tables["Recall and precision of each class on test: the 10 of 40 with the lowest recall"][1:]
    assert [row[2] for row in shown] == [f"{recall:.4f}" for recall in sorted(recalls)[:10]]
    bands = [own["class"] for tag, own in page.tags if "band" in own.get("class", "")]
    assert bands == [*["band c0", "band c1"] * 2, "band c1"]  # of loss and accuracy; top-5 is of test


def test_top_losses_are_explained(trained, text):
    """Next to each is its own image in grey, below the map that `explain` would draw for the predicted class."""
    model, page = load(trained), Page(text)
    recipe, (params, rest) = model.programs.recipe, model.state.evaluated

    def predict(images):
        given = recipe.augment(train=False)(None, images)
        return np.asarray(jax.nn.softmax(recipe.model.apply({"params": params, **rest}, given, train=False)))

    [found] = report_findings.find(model, model.config, {}).sets
    shown = [own for tag, own in page.tags if tag == "img" and "occlusion for " in own["alt"]]
    assert len(found.top_losses) == len(shown) > 1
    for mistake, own in zip(found.top_losses, shown, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(own["src"].partition(",")[2])))
        pixels, label = model.prepare(mistake.example), np.array([mistake.predicted])
        [heat] = attribution.occlusion(predict, pixels[None], label)
        np.testing.assert_allclose(mistake.heat, heat, atol=1e-6)
        wanted = heatmap.overlay(pixels, heatmap.scale(heat, signed=True))
        assert np.abs(np.asarray(picture.convert("RGB"), int) - wanted).max() < 20
        assert own["alt"].startswith(f"{mistake.example}, occlusion for {NAMES[mistake.predicted]}: ")


def test_where_the_data_are_gone(copy, text):
    """Sections without data are unchanged; one sentence says what is left out."""
    config = json.loads((copy / "config.json").read_text())
    config["data"]["source"] = "folder('/nowhere/at/all')"
    change(copy / "config.json", data=config["data"])
    page = Page(reported(copy))
    assert "The data cannot be opened, so this page omits everything that needs them: " in page.text
    assert "/nowhere/at/all" in page.text
    assert list(page.tables) == ["Parameters of the model", "Keys that differ from their defaults"]
    assert page.items == [item for item in Page(text).items if ", loss " not in item]
    accuracy = json.loads((copy / "result.json").read_text())["test"]["accuracy"]
    assert f"copy: test accuracy {accuracy:.4f}" in page.text


def test_another_evaluation_set_is_told(copy):
    text = Page(reported(copy, "--config.data.eval.test=test[:50%]")).text
    assert "This page has other values than the run: data.eval.test: 'test' → 'test[:50%]'. Its scores need" in text


def test_a_run_without_a_checkpoint(copy):
    shutil.rmtree(copy / "checkpoints")
    (copy / "metrics.jsonl").unlink()
    (copy / "result.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    change(copy / "config.json", checkpoint=config["checkpoint"] | {"best": "test/accuracy"})
    text = Page(reported(copy)).text
    for said in ("There is no checkpoint yet", "metrics.jsonl is missing, or has no record yet",
                 "The run is unfinished: its last record is from step 0 of 24.",
                 "checkpoint.best='test/accuracy' selects on the set test: its scores on this"):  # fmt: skip
        assert said in text
    assert "--checkpoint" not in text

"""The page of a trained run holds what `evaluate` finds, and is one safe, well-formed file that refers to nothing."""

import csv
import html
import itertools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from html_page import Page
from PIL import Image

import launch
from imgclf_jax import config as configs
from imgclf_jax import losses, metrics
from imgclf_jax.augment import ops
from imgclf_jax.augment.pixels import to_pixels
from imgclf_jax.core.text import decimals
from imgclf_jax.scores.multilabel import TargetPredictions
from imgclf_jax.tools.report import findings as report_findings
from imgclf_jax.tools.report import sets as report_sets
from imgclf_jax.tools.report import top_losses as report_top_losses
from imgclf_jax.tools.report.calibration import bin_by_confidence
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


def test_its_numbers_are_those_of_evaluate(trained, page, capsys):
    capsys.readouterr()
    assert launch.main(["evaluate", f"--workdir={trained}", "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)["test"]
    rows = page.tables["Scores on test"][1:]
    assert rows == [[name, f"{of['value']:.4f}", f"{of['low']:.4f} to {of['high']:.4f}" if "low" in of else ""]
                    for name, of in found["scores"].items()]  # fmt: skip
    top, head, first, *rest = page.tables["Confusion matrix on test"]
    assert (top, first[0]) == (["", "predicted class"], "true class")
    assert [head, first[1:], *rest] == [
        ["", *NAMES], *([name, *map(str, row)] for name, row in zip(NAMES, found["confusion"], strict=True))
    ]  # fmt: skip
    assert 0 < found["accuracy"] < 1
    assert (
        f"42 examples: accuracy {found['accuracy']:.4g}, loss {found['loss']:.4g}, nll {found['nll']:.4g}" in page.text
    )
    assert f"run: test accuracy {found['accuracy']:.4f} " in page.text
    diagonal, total = np.diag(found["confusion"]), np.sum(found["confusion"], 1)
    assert [row[2] for row in page.tables["Recall and precision of each class on test"][1:]] == [
        f"{right / of:.4f}" for right, of in zip(diagonal, total, strict=True)
    ]


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
        assert item.removesuffix(", where nothing stands out") == (
            f"{row['label']} ({decimals(p)}), {own}, loss {-math.log(p):.3g}{row['example']}Right: occlusion for "
            f"{row['class_1']}")  # fmt: skip
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
    rows = page.tables["Calibration on test"][1:]
    assert [row[1:] for row in rows] == [
        [str(n), f"{total / n:.4f}", f"{right / n:.4f}"] if n else ["0", "", ""] for n, total, right in bins
    ]
    assert [row[0] for row in rows][::7] == ["0.000 to 0.067", "0.467 to 0.533", "0.933 to 1.000"]


def test_edges_and_rows_without_predictions_of_reliability():
    found = bin_by_confidence(np.array([1.0, 0.6, np.nan, 0.6]), np.array([True, False, False, True]))
    assert found.examples.tolist() == [0] * 8 + [2] + [0] * 5 + [1]  # 0.6 is the upper edge of the ninth bin
    assert found.accuracy[[8, 14]].tolist() == [0.5, 1.0]
    assert np.isnan(found.confidence[0])


def test_it_is_well_formed_and_refers_to_nothing(text, page):
    assert (page.open, page.wrong) == ([], [])
    assert not re.search(r"url\(|@import|<link|<script|<iframe|onload=\"x\"|onclick", text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert re.match(r"data:image/png;base64,|#", attributes.get(name, "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    places = {attributes.get("id") for _, attributes in page.tags}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(links) == 6
    assert {link.removeprefix("#") for link in links} <= places
    for name in NAMES:  # unchanged for who reads the page
        assert name in page.tables["Confusion matrix on test"][1]
        assert name not in text


def test_it_can_be_read_aloud(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    tables = [tag for tag, _ in page.tags if tag == "table"]
    assert len(tables) == len([tag for tag, _ in page.tags if tag == "caption"]) == len(page.tables) == 6
    assert all(own.get("scope") in ("col", "row", "colgroup", "rowgroup") for tag, own in page.tags if tag == "th")
    assert all(own["alt"] for tag, own in page.tags if tag == "img")
    assert all(own.get("aria-label") or own.get("aria-hidden") for tag, own in page.tags if tag == "svg")
    regions = [own for tag, own in page.tags if own.get("role") == "region"]
    assert all(own["tabindex"] == "0" and own["aria-label"] for own in regions)


def test_curves_and_origin(trained, page):
    charts = [item for item in page.items if ", loss " not in item]
    assert charts == ["loss", "accuracy", "nll", "learning rate", "gradient norm", "parameter norm",
                      "training images per second", "waiting for input, % of the time"]  # fmt: skip
    result = json.loads((trained / "result.json").read_text())
    provenance = json.loads((trained / "provenance.json").read_text())
    for fact in (result["params_sha256"], provenance["data"]["fingerprint"], provenance["started"]):
        assert fact in page.text
    assert ["batch_size", "9", "128"] in page.tables["Keys that differ from their defaults"]
    assert f"uv run launch.py evaluate --workdir={trained} --checkpoint=24" in page.text


def test_the_parameters_of_the_model(trained, page):
    """They add up to those of the run, and its FLOPs to two per multiply-add of its two layers."""
    head, *modules = page.tables["Parameters of the model"]
    total = sum(x.size for x in jax.tree.leaves(load(trained).state.params))
    assert head == ["module", "parameters"]
    assert sum(int(row[1].replace(",", "")) for row in modules) == total
    flops = 2 * (8 * 8 * 3 * 4 + 4 * 3)
    assert f"{total:,} parameters, {flops / 1e6:.3g} MFLOPs for the forward pass" in page.text


@pytest.mark.parametrize(
    "text",
    [
        "normalize",
        "normalize(0.5, 0.25)",
        "normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))",
        "",
    ],
)
def test_pixels_are_those_before_normalization(text):
    images = np.random.default_rng(0).integers(256, size=(2, 4, 5, 3), dtype=np.uint8)
    pixels, stretched = to_pixels(np.asarray(ops.build(text, train=True)(None, images)), text)
    assert np.allclose(pixels * 255, images, atol=1e-3)
    assert not stretched


def test_values_of_any_range_are_stretched():
    pixels, stretched = to_pixels(np.array([-2.0, 0.0, 2.0], np.float32).reshape(1, 3, 1, 1), "my_ops:own")
    assert pixels.ravel().tolist() == [0.0, 0.5, 1.0]
    assert stretched


def test_an_own_op_after_normalize_is_stretched_only_beyond_the_range():
    """Values beyond 0 to 1 were clipped, though only the op knows its range."""
    text = "normalize(0.5, 0.25)|my_ops:own"
    pixels, stretched = to_pixels(np.array([-4.0, 0.0, 4.0], np.float32).reshape(1, 3, 1, 1), text)
    assert (pixels.ravel().tolist(), stretched) == ([0.0, 0.5, 1.0], True)
    pixels, stretched = to_pixels(np.array([-2.0, 1.0, 2.0], np.float32).reshape(1, 3, 1, 1), text)
    assert (pixels.ravel().tolist(), stretched) == ([0.0, 0.75, 1.0], False)


def test_mistakes_are_those_of_accuracy():
    """An example whose logits are NaN is one, or the page would say that none is wrong."""
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [np.nan, 0.0]], np.float32)
    found = metrics.predict(jnp.asarray(logits), jnp.array([0, 1, 1]), losses.SOFTMAX, jnp.ones(3, bool))
    assert report_top_losses.count_mistakes(found) == 1


def test_a_methods_own_metric_of_several_seeds_is_shown():
    """It has a mean and a standard deviation, and no value of the ensemble."""
    found = {"examples": 10, "loss": 0.5, "loss_std": 0.1, "norm": 2.0, "norm_std": 0.2, "ensemble_loss": 0.4}
    page = Page(f"<main>{report_sets._metrics('test', found, 2)}</main>")
    assert page.tables["Metrics on test"][1:] == [
        ["loss", "0.5000", "0.1000", "0.4000"], ["norm", "2.0000", "0.2000", ""]
    ]  # fmt: skip


def test_of_many_labels_those_with_the_lowest_average_precision_are_shown():
    """In the order of the numbers, not of their text, which may be '<0.0001' or '>0.9999'."""
    n = 40_000
    targets, outputs = np.zeros((n, 102), np.float32), np.tile(np.linspace(1, 0, n, dtype=np.float32)[:, None], 102)
    targets[n - 1, 0] = 1  # its average precision is 1 / n
    for c in range(1, 100):
        targets[[0, c + 1], c] = 1  # the mean of 1 and 2 / (c + 2)
    targets[:20_000, 100], targets[19_998, 100] = 1, 0  # almost 1
    names = [f"c{i}" for i in range(102)]  # the last has no example
    page = Page(f"<main>{report_sets._labels('test', TargetPredictions(targets, outputs, outputs), names)}</main>")
    [rows] = [rows for caption, rows in page.tables.items() if "the 100 of 102 with the lowest" in caption]
    assert [row[0] for row in rows[1:]] == ["c0", *(f"c{i}" for i in range(99, 0, -1))]
    assert rows[1][2] == "<0.0001"


def test_values_of_the_command_line_that_are_not_the_runs(tmp_path):
    """The page had the scores of these values beside the run's configuration, and did not say so."""
    (tmp_path / "config.json").write_text(configs.to_json(configs.default_config()))
    changed = ["--config.tta=flip", "--config.data.eval.test=train", "--config.data.eval.new=train",
               "--config.metrics=auc", "--config.data.threads=2"]  # fmt: skip
    said = []
    for flags in ([], changed):
        assert launch.main(["report", f"--workdir={tmp_path}", *flags]) == 0
        page = html.unescape((tmp_path / "report.html").read_text())
        said.append(re.findall(r"This page has other values than the run: .*?</p>", page))
    assert said == [[], ["This page has other values than the run: tta: '' → 'flip'; data.eval.test: 'test' → 'train'. "
                         "Its scores need not be the run's.</p>"]]  # fmt: skip

"""Reports of several seeds, of many classes, of old and unfinished runs, and of runs whose data are gone."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from html_page import Page
from PIL import Image
from test_report import NAMES, reported, text, trained  # noqa: F401  fixtures

import launch
from imgclf_jax.tools.explain import attribution, heatmap
from imgclf_jax.tools.report import findings as report_findings
from imgclf_jax.trained import load

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.thorough]

SEEDS = ("--config.data.source=fake(96, (6, 6, 1), 40)", "--config.preprocess=decode(1)", "--config.augment=",
         "--config.model=mlp(widths=(4,))", "--config.total=3 steps", "--config.batch_size=16", "--config.num_seeds=2",
         "--config.schedule=constant(1e-2)", "--config.eval_every=1 steps", "--config.log_every=1 steps")  # fmt: skip


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("report.html")))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_several_seeds_and_many_classes(tmp_path, capsys, monkeypatch):
    """Scores, confusions and mistakes are the ensemble's, as the page says; 40 classes have no matrix."""
    monkeypatch.setattr("imgclf_jax.tools.report.sets._ROWS", 10)
    workdir = tmp_path / "run"
    assert launch.main([f"--workdir={workdir}", *SEEDS]) == 0
    page = Page(reported(workdir))
    capsys.readouterr()
    assert launch.main(["evaluate", f"--workdir={workdir}", "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)["test"]
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


@pytest.mark.parametrize("key", ["source", "eval"])
def test_a_run_that_names_code_is_refused(copy, capsys, key):
    config = json.loads((copy / "config.json").read_text())
    call = f"os:system('touch {copy}/harm')"
    config["data"][key] = call if key == "source" else {"test": f"{call}/test"}
    change(copy / "config.json", **config)
    assert launch.main(["report", f"--workdir={copy}"]) == 1
    assert re.search(r"error: .* names .*'os:system'.*add --trust", capsys.readouterr().err)
    assert not (copy / "harm").exists()
    assert not (copy / "report.html").exists()


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

"""Several labels per example through every tool, on scikit-learn's digits."""

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from fastapi.testclient import TestClient
from PIL import Image
from sklearn.datasets import load_digits

import launch
from imgclf_jax import datasets
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.trained import restore

pytestmark = pytest.mark.usefixtures("one_device")

N, TRAIN = 304, 240
FLAGS = ("--config.preprocess=decode(1)", "--config.augment=normalize", "--config.model=mlp(widths=(32,))",
         "--config.batch_size=48", "--config.total=10 epochs", "--config.schedule=constant(1e-2)",
         "--config.log_every=5 epochs", "--config.eval_every=5 epochs", "--config.checkpoint_every=5 epochs",
         "--config.tensorboard=False")  # fmt: skip
BEST = "test/mean_average_precision"
DIGITS = load_digits()


def write_pairs(folder):
    """Two digits side by side, a .png each, and a .csv file whose ten columns say which digits are present."""
    folder.mkdir()
    images = (DIGITS.images * 255 / 16).astype(np.uint8)
    pairs = np.random.default_rng(0).integers(0, len(images), (N, 2))
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "split", *(f"a {c}" for c in range(10))])
        for i, pair in enumerate(pairs):
            Image.fromarray(np.concatenate(images[pair], 1)).save(folder / f"{i}.png")
            targets = [int(c in DIGITS.target[pair]) for c in range(10)]
            rows.writerow([f"{i}.png", "train" if i < TRAIN else "test", *targets])
    return f"table('{folder}/labels.csv', targets={tuple(f'a {c}' for c in range(10))!r})"


def train(workdir, *flags, source=""):
    source = source or write_pairs(workdir.with_suffix(".files"))
    argv = [f"--workdir={workdir}", f"--config.data.source={source}", "--config.loss=sigmoid", *FLAGS,
            f"--config.checkpoint.best={BEST}", *flags]  # fmt: skip
    assert launch.main(argv) == 0
    return Workdir(workdir)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tasks") / "pairs")


def outputs_of(workdir, what="predict"):
    """(targets f64[64, k], probabilities f64[64, k] or logits) on the test set."""
    model = restore(workdir.load_config(), workdir, "latest")
    images = datasets.eval_images(datasets.open_data(model.config)["test"], model.config)
    read = images.read(np.arange(len(images)), np.arange(len(images)))
    found = np.asarray(model.programs.inference(what)(*model.state.evaluated, read["image"]))
    return read["target"].astype(np.float64), found.astype(np.float64)


def expected(targets, outputs):
    """The metrics by scikit-learn."""
    predicted = outputs >= 0.5
    return {
        "nll": -np.sum(np.where(targets > 0, np.log(outputs), np.log1p(-outputs)), 1).mean(),
        "mean_average_precision": sklearn.metrics.average_precision_score(targets, outputs, average="macro"),
        "micro_f1": sklearn.metrics.f1_score(targets, predicted, average="micro"),
        "macro_f1": sklearn.metrics.f1_score(targets, predicted, average="macro"),
        "exact_match": sklearn.metrics.accuracy_score(targets, predicted),
    }


@pytest.mark.thorough
def test_training_records_the_metrics_of_the_task(run):
    """The result, the log and the best checkpoint; the numbers are scikit-learn's, from the outputs of `predict`."""
    result = json.loads(run.result.read_text())["test"]
    found = expected(*outputs_of(run))
    assert {key: result[key] for key in found} == {key: pytest.approx(x, rel=1e-5) for key, x in found.items()}
    assert result["examples"] == N - TRAIN
    logged = {key for record in read_metrics(run.metrics) for key in record}
    assert {"train/accuracy", "train/exact_match"} & logged == {"train/exact_match"}
    values = {r["step"]: r[BEST] for r in read_metrics(run.metrics) if BEST in r}
    assert restore(run.load_config(), run, "best").step == max(values, key=values.__getitem__)


def test_a_metric_of_one_class_is_refused_before_the_run_begins(tmp_path, capsys):
    argv = [f"--workdir={tmp_path / 'run'}", f"--config.data.source={write_pairs(tmp_path / 'data')}", *FLAGS]
    assert launch.main([*argv, "--config.loss=sigmoid", "--config.checkpoint.best=test/accuracy"]) == 1
    assert "evaluation has no 'accuracy'; it has loss, nll, mean_average_" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.thorough
def test_evaluate_of_several_labels(run, printed, tmp_path):
    targets, outputs = outputs_of(run)
    file = tmp_path / "all.csv"
    argv = ["evaluate", f"--workdir={run.path}", "--checkpoint=latest"]
    found = json.loads(printed(*argv, "--format=json", f"--predictions={file}"))["test"]
    each = sklearn.metrics.average_precision_score(targets, outputs, average=None)
    assert [one["average_precision"] for one in found["classes"]] == pytest.approx(each.tolist(), abs=1e-6)
    assert [one["class"] for one in found["classes"]] == found["class_names"] == [f"a {i}" for i in range(10)]
    assert [one["examples"] for one in found["classes"]] == targets.sum(0).tolist()
    for name in ("mean_average_precision", "micro_f1", "macro_f1", "exact_match"):
        own = found["scores"][name]
        assert own["value"] == found[name]
        assert own["low"] < own["value"] < own["high"]
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert np.mean([r["correct"] == "True" for r in rows]) == found["exact_match"]
    saved = [[[float(r[f"{kind}[a {c}]"]) for c in range(10)] for r in rows] for kind in ("target", "probability")]
    np.testing.assert_allclose(saved, [targets, outputs], rtol=1e-5)
    shown = printed(*argv)
    assert f"mean_average_precision {found['mean_average_precision']:.4g}" in shown
    assert ["best threshold" in shown, "accuracy" in shown] == [True, False]


def paths_of(workdir):
    """The files of the first three test images."""
    source = datasets.open_data(workdir.load_config())["test"]
    return [Path(source.example_name(i)) for i in range(3)]


def test_predict_of_several_labels_prints_all_from_the_threshold_on(run, capsys, printed):
    paths, (_, outputs) = paths_of(run), outputs_of(run)
    argv = ["predict", *paths, f"--workdir={run.path}", "--checkpoint=latest"]
    found = [json.loads(line) for line in printed(*argv, "--format=jsonl", "--threshold=0.2").splitlines()]
    for record, own in zip(found, outputs, strict=False):
        order = [c for c in np.argsort(-own) if own[c] >= 0.2]
        assert [p["class"] for p in record["predictions"]] == [f"a {c}" for c in order]
        assert [p["probability"] for p in record["predictions"]] == pytest.approx(own[order].tolist(), abs=1e-5)
    each = ",".join(["1", "0.999"] + ["0"] * 8)
    [row, *_] = csv.DictReader(printed(*argv, "--format=csv", f"--threshold={each}").splitlines())
    assert set(row["labels"].split("|")) == {f"a {c}" for c in range(2, 10)}
    assert float(row["probability[a 0]"]) == pytest.approx(outputs[0, 0], abs=1e-5)
    for wrong in ("0.5,0.5", "1.5"):
        assert launch.main([*map(str, argv), f"--threshold={wrong}"]) == 1
        assert "a number from 0 to 1, or 10 numbers separated by commas, one per class" in capsys.readouterr().err


@pytest.mark.thorough
def test_every_tool_has_the_labels(run, printed, tmp_path):
    """Names and numbers as in the table, and probabilities as of `predict`."""
    paths, (targets, outputs) = paths_of(run), outputs_of(run)
    workdir = f"--workdir={run.path}"
    printed("features", workdir, f"--output={tmp_path / 'all.npz'}")
    printed("features", *paths, workdir, f"--output={tmp_path / 'some.npz'}")
    with np.load(tmp_path / "all.npz") as found, np.load(tmp_path / "some.npz") as unknown:
        np.testing.assert_array_equal(found["targets"], targets.astype(np.float32))
        assert found["target_names"].tolist() == [f"a {i}" for i in range(10)]
        assert np.isnan(unknown["targets"]).all()

    argv = ["show-batch", workdir, "--format=json", f"--output={tmp_path / 'a.png'}", "--count=4"]
    lines = csv.DictReader((run.path.parent / "pairs.files" / "labels.csv").read_text().splitlines())
    rows = {row.pop("file"): row for row in lines}
    for one in json.loads(printed(*argv))["examples"]:
        row = rows[Path(one["file"]).name]
        assert row.pop("split") == "train"
        assert {name: str(int(x)) for name, x in one["target"].items()} == row
    printed(*argv, "--config.method=simclr")  # two views, which need no target

    more = ["--method=occlusion", f"--output={tmp_path}", "--format=json", "--checkpoint=latest"]
    explained = json.loads(printed("explain", *paths, workdir, *more))
    assert [one["class"] for one in explained] == [f"a {c}" for c in outputs[:3].argmax(1)]

    printed("report", workdir, f"--html={tmp_path / 'a.html'}")
    page = (tmp_path / "a.html").read_text()
    assert "test mean average precision" in page
    assert "Average precision and decisions of each class" in page
    assert "accuracy" not in page.replace("train/accuracy", "")

    printed("export", tmp_path / "a.stablehlo", workdir)
    described = json.loads(zipfile.ZipFile(tmp_path / "a.stablehlo").read("metadata.json"))
    assert [described["gives"], described["task"]] == ["probabilities", "multilabel"]

    from imgclf_jax.tools.serve import app

    with TestClient(app.build(restore(run.load_config(), run, "latest"))) as client:
        [answer] = client.post("/predict", files={"images": paths[0].read_bytes()}).json()
    assert len(answer["predictions"]) == (outputs[0] >= 0.5).sum()


@pytest.mark.thorough
def test_several_seeds_report_means_and_their_ensemble(tmp_path):
    """An ensemble averages the probabilities, also with mixing and accumulation."""
    workdir = train(tmp_path / "run", "--config.num_seeds=2", "--config.mix=mixup(0.2)", "--config.accumulate=2")
    targets, together = outputs_of(workdir)
    each = outputs_of(workdir, "logits")[1]
    each = 1 / (1 + np.exp(-each))
    np.testing.assert_allclose(each.mean(0), together, rtol=1e-5, atol=1e-6)
    result = json.loads(workdir.result.read_text())["test"]
    seeds = [expected(targets, own) for own in each]
    for key, value in expected(targets, together).items():
        assert result[f"ensemble_{key}"] == pytest.approx(value, rel=1e-4)
        assert result[key] == pytest.approx(np.mean([one[key] for one in seeds]), rel=1e-4)
        assert result[f"{key}_std"] == pytest.approx(np.std([one[key] for one in seeds], ddof=1), rel=1e-2, abs=1e-6)


@pytest.mark.thorough
def test_compare_counts_examples_with_all_labels(run, tmp_path, printed):
    source = run.load_config().data.source
    dirs = [run.path, train(tmp_path / "small", "--config.model=mlp(widths=(8,))", source=source).path]
    [one] = json.loads(printed("compare", *dirs, "--test", "--format=json"))["comparisons"]
    exact = [json.loads((path / "result.json").read_text())["test"]["exact_match"] for path in dirs]
    assert abs(one["difference"]["value"]) == pytest.approx(abs(exact[0] - exact[1]), abs=1e-6)
    assert "with all labels, if there are several" in " ".join(printed("compare", *dirs).split())

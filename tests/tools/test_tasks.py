"""Several labels per example and distributions, through every tool, on scikit-learn's digits."""

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from cases import thorough
from fastapi.testclient import TestClient
from PIL import Image
from sklearn.datasets import load_digits

import launch
from imgclf_jax import datasets, losses
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.tools.serve import app
from imgclf_jax.trained import restore

pytestmark = pytest.mark.usefixtures("one_device")

N, TRAIN = 304, 240
FLAGS = ("--config.preprocess=decode(1)", "--config.augment=normalize", "--config.model=mlp(widths=(32,))",
         "--config.batch_size=48", "--config.total=10 epochs", "--config.schedule=constant(1e-2)",
         "--config.log_every=5 epochs", "--config.eval_every=5 epochs", "--config.checkpoint_every=5 epochs",
         "--config.tensorboard=False")  # fmt: skip
LOSS = {"pairs": "sigmoid", "soft": "softmax"}
BEST = {"pairs": "test/mean_average_precision", "soft": "test/kl"}
DIGITS = load_digits()


def write_pairs(path):
    """Two digits side by side; ten columns say which digits are present."""
    images = (DIGITS.images * 255 / 16).astype(np.uint8)
    left, right = np.random.default_rng(0).integers(0, len(images), (2, N))
    targets = np.zeros((N, 10), np.uint8)
    for side in (left, right):
        targets[np.arange(N), DIGITS.target[side]] = 1
    return write_table(path, np.concatenate([images[left], images[right]], 2), targets, [f"a {i}" for i in range(10)])


def write_soft(path):
    """A digit's label with a probability of 0.82, the others with 0.02 each."""
    targets = np.full((N, 10), 0.02)
    targets[np.arange(N), DIGITS.target[:N]] = 0.82
    images = (DIGITS.images[:N] * 255 / 16).astype(np.uint8)
    np.savez(path, train_images=images[:TRAIN], train_targets=targets[:TRAIN], test_images=images[TRAIN:],
             test_targets=targets[TRAIN:], target_names=[str(i) for i in range(10)])  # fmt: skip
    return f"arrays({str(path)!r})"


def write_table(path, images, targets, names):
    """One .png per image, and a .csv file with a column per target."""
    folder = path.with_suffix(".files")
    folder.mkdir(exist_ok=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "split", *names])
        for i, (image, target) in enumerate(zip(images, targets, strict=True)):
            Image.fromarray(image).save(folder / f"{i}.png")
            rows.writerow([f"{i}.png", "train" if i < TRAIN else "test", *target.tolist()])
    return f"table({str(folder / 'labels.csv')!r}, targets={tuple(names)!r})"


WRITE = {"pairs": write_pairs, "soft": write_soft}


def train(folder, name, *flags):
    source = WRITE[name](folder / f"{name}.npz")
    argv = [f"--workdir={folder / name}", f"--config.data.source={source}", f"--config.loss={LOSS[name]}", *FLAGS,
            f"--config.checkpoint.best={BEST[name]}", *flags]  # fmt: skip
    assert launch.main(argv) == 0
    return Workdir(folder / name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(name): the trained run of a data set, trained once."""
    folder, known = tmp_path_factory.mktemp("tasks"), {}

    def run(name):
        if name not in known:
            known[name] = train(folder, name)
        return known[name]

    return run


def outputs_of(workdir):
    """(targets, probabilities), f64[64, k] each, on the test set."""
    model = restore(workdir.load_config(), workdir, "latest")
    images = model.programs.eval_images(datasets.open_data(workdir.load_config())["test"])
    read = images.read(np.arange(len(images)), np.arange(len(images)))
    found = np.asarray(model.programs.inference("predict")(*model.state.evaluated, read["image"]))
    return read["target"].astype(np.float64), found.astype(np.float64)


def expected(name, targets, outputs):
    """The metrics by scikit-learn."""
    if name == "pairs":
        predicted = outputs >= 0.5
        return {
            "nll": -np.sum(np.where(targets > 0, np.log(outputs), np.log1p(-outputs)), 1).mean(),
            "mean_average_precision": sklearn.metrics.average_precision_score(targets, outputs, average="macro"),
            "micro_f1": sklearn.metrics.f1_score(targets, predicted, average="micro"),
            "macro_f1": sklearn.metrics.f1_score(targets, predicted, average="macro"),
            "exact_match": sklearn.metrics.accuracy_score(targets, predicted),
        }
    nll, entropy = (-np.sum(targets * np.log(x), 1).mean() for x in (outputs, targets))
    return {"accuracy": np.mean(targets.argmax(1) == outputs.argmax(1)), "nll": nll, "kl": nll - entropy}


@pytest.mark.parametrize("name", thorough("pairs", "soft"))
def test_training_records_the_metrics_of_the_task(runs, name):
    """The result, the log and the best checkpoint; the numbers are scikit-learn's, from the outputs of `predict`."""
    workdir = runs(name)
    result = json.loads(workdir.result.read_text())["test"]
    found = expected(name, *outputs_of(workdir))
    assert {key: result[key] for key in found} == {key: pytest.approx(x, rel=1e-5) for key, x in found.items()}
    assert result["examples"] == N - TRAIN
    logged = {key.partition("/")[2] for record in read_metrics(workdir.metrics) for key in record if "train/" in key}
    assert {"accuracy", "exact_match"} & logged == {"pairs": {"exact_match"}, "soft": {"accuracy"}}[name]
    values = {r["step"]: r[BEST[name]] for r in read_metrics(workdir.metrics) if BEST[name] in r}
    best = restore(workdir.load_config(), workdir, "best")
    assert best.step == (max if name == "pairs" else min)(values, key=values.__getitem__)


@pytest.mark.parametrize(("flag", "said"), [
    ("--config.loss=softmax", "sums to 2, not to 1; divide each row by its sum, or use 'sigmoid'"),
    ("--config.checkpoint.best=test/accuracy", "a run with several labels has no accuracy; it has loss, nll, "),
])  # fmt: skip
def test_what_does_not_fit_the_data_is_told(tmp_path, capsys, flag, said):
    source = write_pairs(tmp_path / "data.npz")
    argv = [f"--workdir={tmp_path / 'run'}", f"--config.data.source={source}", "--config.loss=sigmoid", *FLAGS]
    assert launch.main([*argv, flag]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()  # all is checked before a run begins


def printed(capsys, *argv):
    """The standard output of a command, which must succeed."""
    capsys.readouterr()
    assert launch.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def test_evaluate_of_several_labels(runs, capsys, tmp_path):
    targets, outputs = outputs_of(runs("pairs"))
    file = tmp_path / "all.csv"
    argv = ["evaluate", f"--workdir={runs('pairs').path}", "--checkpoint=latest"]
    found = json.loads(printed(capsys, *argv, "--format=json", f"--predictions={file}"))["test"]
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
    shown = printed(capsys, *argv)
    assert f"mean_average_precision {found['mean_average_precision']:.4g}" in shown
    assert ["best threshold" in shown, "accuracy" in shown] == [True, False]


def paths_of(workdir):
    """The files of the first three test images."""
    source = datasets.open_data(workdir.load_config())["test"]
    return [Path(source.example_name(i)) for i in range(3)]


def test_predict_of_several_labels_prints_all_from_the_threshold_on(runs, capsys):
    paths, (_, outputs) = paths_of(runs("pairs")), outputs_of(runs("pairs"))
    argv = ["predict", *paths, f"--workdir={runs('pairs').path}", "--checkpoint=latest"]
    found = [json.loads(line) for line in printed(capsys, *argv, "--format=jsonl", "--threshold=0.2").splitlines()]
    for record, own in zip(found, outputs, strict=False):
        order = [c for c in np.argsort(-own) if own[c] >= 0.2]
        assert [p["class"] for p in record["predictions"]] == [f"a {c}" for c in order]
        assert [p["probability"] for p in record["predictions"]] == pytest.approx(own[order].tolist(), abs=1e-5)
    each = ",".join(["1", "0.999"] + ["0"] * 8)
    [row, *_] = csv.DictReader(printed(capsys, *argv, "--format=csv", f"--threshold={each}").splitlines())
    assert set(row["labels"].split("|")) == {f"a {c}" for c in range(2, 10)}
    assert float(row["probability[a 0]"]) == pytest.approx(outputs[0, 0], abs=1e-5)
    assert launch.main([*map(str, argv), "--threshold=0.5,0.5"]) == 1
    assert "must be a number from 0 to 1, or 10 numbers separated by commas, one per class" in capsys.readouterr().err


@pytest.mark.thorough
def test_every_tool_has_the_labels(runs, capsys, tmp_path):
    """Names and numbers as in the table, and probabilities as of `predict`."""
    workdir, paths, (targets, outputs) = runs("pairs"), paths_of(runs("pairs")), outputs_of(runs("pairs"))
    run = f"--workdir={workdir.path}"
    printed(capsys, "features", run, f"--output={tmp_path / 'all.npz'}")
    printed(capsys, "features", *paths, run, f"--output={tmp_path / 'some.npz'}")
    with np.load(tmp_path / "all.npz") as found, np.load(tmp_path / "some.npz") as unknown:
        np.testing.assert_array_equal(found["targets"], targets.astype(np.float32))
        assert found["target_names"].tolist() == [f"a {i}" for i in range(10)]
        assert np.isnan(unknown["targets"]).all()

    argv = ["show-batch", run, "--format=json", f"--output={tmp_path / 'a.png'}", "--count=4"]
    lines = csv.DictReader((workdir.path.parent / "pairs.files" / "labels.csv").read_text().splitlines())
    rows = {row.pop("file"): row for row in lines}
    for one in json.loads(printed(capsys, *argv))["examples"]:
        row = rows[Path(one["file"]).name]
        assert row.pop("split") == "train"
        assert {name: str(int(x)) for name, x in one["target"].items()} == row
    printed(capsys, *argv, "--config.method=simclr")  # two views, which need no target

    more = ["--method=occlusion", f"--output={tmp_path}", "--format=json", "--checkpoint=latest"]
    explained = json.loads(printed(capsys, "explain", *paths, run, *more))
    assert [one["class"] for one in explained] == [f"a {c}" for c in outputs[:3].argmax(1)]

    printed(capsys, "report", run, f"--html={tmp_path / 'a.html'}")
    page = (tmp_path / "a.html").read_text()
    assert "test mean average precision" in page
    assert "Average precision and decisions of each class" in page
    assert "accuracy" not in page.replace("train/accuracy", "")

    printed(capsys, "export", tmp_path / "a.stablehlo", run)
    described = json.loads(zipfile.ZipFile(tmp_path / "a.stablehlo").read("metadata.json"))
    assert [described["gives"], described["task"]] == ["probabilities", "multilabel"]

    with TestClient(app.build(restore(workdir.load_config(), workdir, "latest"))) as client:
        [answer] = client.post("/predict", files={"images": paths[0].read_bytes()}).json()
    assert len(answer["predictions"]) == (outputs[0] >= 0.5).sum()


@pytest.mark.parametrize("name", thorough("pairs", "soft"))
def test_several_seeds_report_means_and_their_ensemble(tmp_path, name):
    """An ensemble averages the probabilities, also with mixing and accumulation."""
    workdir = train(tmp_path, name, "--config.num_seeds=2", "--config.mix=mixup(0.2)", "--config.accumulate=2")
    targets, together = outputs_of(workdir)
    model = restore(workdir.load_config(), workdir, "latest")
    images = model.programs.eval_images(datasets.open_data(workdir.load_config())["test"])
    everything = np.arange(len(images))
    read = images.read(everything, everything)
    logits = np.asarray(model.programs.inference("logits")(*model.state.evaluated, read["image"]))
    each = np.asarray(losses.link_of(LOSS[name]).probabilities(logits), np.float64)
    np.testing.assert_allclose(each.mean(0), together, rtol=1e-5, atol=1e-6)
    result = json.loads(workdir.result.read_text())["test"]
    seeds = [expected(name, targets, own) for own in each]
    for key, value in expected(name, targets, together).items():
        assert result[f"ensemble_{key}"] == pytest.approx(value, rel=1e-4)
        assert result[key] == pytest.approx(np.mean([one[key] for one in seeds]), rel=1e-4)
        assert result[f"{key}_std"] == pytest.approx(np.std([one[key] for one in seeds], ddof=1), rel=1e-2, abs=1e-6)


@pytest.mark.thorough
def test_compare_counts_examples_with_all_labels(tmp_path, capsys):
    for name, widths in (("run0", 32), ("run1", 8)):
        train(tmp_path, "pairs", f"--config.model=mlp(widths=({widths},))").path.rename(tmp_path / name)
    dirs = [tmp_path / "run0", tmp_path / "run1"]
    [one] = json.loads(printed(capsys, "compare", *dirs, "--test", "--format=json"))["comparisons"]
    exact = [json.loads((path / "result.json").read_text())["test"]["exact_match"] for path in dirs]
    assert abs(one["difference"]["value"]) == pytest.approx(abs(exact[0] - exact[1]), abs=1e-6)
    assert "with all labels, if there are several" in " ".join(printed(capsys, "compare", *dirs).split())

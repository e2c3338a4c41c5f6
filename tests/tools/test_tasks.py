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
from imgclf_jax import datasets, metrics
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.tools.serve import app
from imgclf_jax.train.evaluation import evaluate
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
    best = restore(workdir.load_config(), workdir, "best")
    value = BEST[name].partition("/")[2]
    sums, predictions = evaluate(best.programs, best.state, best.programs.eval_images(
        datasets.open_data(workdir.load_config())["test"]))  # fmt: skip
    kept = metrics.summarize(sums, predictions, best.programs.recipe.whole_set_metrics)[value]
    values = [r[f"test/{value}"] for r in read_metrics(workdir.metrics) if f"test/{value}" in r]
    assert kept == pytest.approx(max(values) if name == "pairs" else min(values), rel=1e-6)


@pytest.mark.parametrize(("name", "flags", "said"), [
    ("pairs", ["--config.loss=softmax"], "sums to 2, not to 1; divide each row by its sum, or use 'sigmoid'"),
    ("pairs", ["--config.metrics=balanced_accuracy"], "unknown metric of several labels 'balanced_accuracy'"),
    ("pairs", ["--config.checkpoint.best=test/accuracy"], "a run with several labels has no accuracy; it has "
                                                          "loss, nll, mean_average_precision"),
    ("pairs", ["--config.metrics=f1(threshold=(0.3, 0.4))"], "threshold must be a number or 10 of them, one per class"),
])  # fmt: skip
def test_what_does_not_fit_the_data_is_told(tmp_path, capsys, name, flags, said):
    source = WRITE[name](tmp_path / "data.npz")
    argv = [f"--workdir={tmp_path / 'run'}", f"--config.data.source={source}", f"--config.loss={LOSS[name]}", *FLAGS]
    assert launch.main([*argv, *flags]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()  # all is checked before a run begins


def printed(capsys, *argv):
    """The standard output of a command, which must succeed."""
    capsys.readouterr()
    assert launch.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv):
    """The one sentence with which a command ends with status 1."""
    capsys.readouterr()
    assert launch.main([str(word) for word in argv]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


@pytest.fixture(scope="module")
def pictures():
    """pictures(name): the paths of the first three test images."""

    def of(name, runs):
        source = datasets.open_data(runs(name).load_config())["test"]
        return [Path(source.example_name(i)) for i in range(3)]

    return of


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
    np.testing.assert_allclose([float(r["probability[a 3]"]) for r in rows], outputs[:, 3], rtol=1e-5)
    assert [float(r["target[a 3]"]) for r in rows] == targets[:, 3].tolist()
    assert np.mean([r["correct"] == "True" for r in rows]) == found["exact_match"]
    saved = np.array([[[float(r[f"{kind}[a {c}]"]) for c in range(10)] for r in rows]
                      for kind in ("target", "probability")])  # fmt: skip
    assert abs(found["mean_average_precision"] - sklearn.metrics.average_precision_score(*saved)) < 1e-12
    shown = printed(capsys, *argv)
    assert f"mean_average_precision {found['mean_average_precision']:.4g}" in shown
    assert ["best threshold" in shown, "accuracy" in shown] == [True, False]


@pytest.mark.thorough
def test_an_attack_raises_the_cross_entropy_with_a_distribution(runs, capsys):
    argv = ["evaluate", f"--workdir={runs('soft').path}", "--format=json"]
    clean = json.loads(printed(capsys, *argv))["test"]
    found = json.loads(printed(capsys, *argv, "--attack=pgd(eps=0.1)"))["test"]
    assert [found["accuracy"], found["nll"]] == pytest.approx([clean["accuracy"], clean["nll"]], rel=1e-5)
    assert found["attacked_nll"] > found["nll"]
    assert found["attacked_accuracy"] < found["accuracy"]


def test_predict_of_several_labels_prints_all_from_the_threshold_on(runs, pictures, capsys):
    paths, (_, outputs) = pictures("pairs", runs), outputs_of(runs("pairs"))
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
    allowed = "must be a number from 0 to 1, or 10 numbers separated by commas, one per class"
    assert allowed in refused(capsys, *argv, "--threshold=0.5,0.5")


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["pairs"])
def test_features_keep_the_targets(runs, capsys, tmp_path, name, pictures):
    targets, _ = outputs_of(runs(name))
    argv = ["features", f"--workdir={runs(name).path}"]
    printed(capsys, *argv, f"--output={tmp_path / 'all.npz'}")
    found = np.load(tmp_path / "all.npz")
    np.testing.assert_array_equal(found["targets"], targets.astype(np.float32))
    assert found["target_names"].tolist() == list(restore(runs(name).load_config(), runs(name), "").class_names)
    assert "labels" not in found
    printed(capsys, argv[0], *pictures(name, runs), argv[1], f"--output={tmp_path / 'some.npz'}")
    assert np.isnan(np.load(tmp_path / "some.npz")["targets"]).all()


@pytest.mark.parametrize("name", ["pairs"])
def test_show_batch_has_the_targets_of_the_examples(runs, capsys, tmp_path, name):
    argv = [
        "show-batch",
        f"--workdir={runs(name).path}",
        "--format=json",
        f"--output={tmp_path / 'a.png'}",
        "--count=4",
    ]
    examples = json.loads(printed(capsys, *argv))["examples"]
    lines = csv.DictReader((runs(name).path.parent / f"{name}.files" / "labels.csv").read_text().splitlines())
    rows = {row.pop("file"): row for row in lines}
    for one in examples:
        row = rows[Path(one["file"]).name]
        assert row.pop("split") == "train"
        assert list(one["target"]) == list(row)
        assert list(one["target"].values()) == pytest.approx([float(x) for x in row.values()], rel=1e-6)
    printed(capsys, *argv, "--config.method=simclr")  # two views, which need no target


@pytest.mark.thorough
def test_explain_names_the_class(runs, pictures, capsys, tmp_path):
    more = ["--method=occlusion", f"--output={tmp_path}", "--format=json", "--checkpoint=latest"]
    _, outputs = outputs_of(runs("pairs"))
    found = json.loads(printed(capsys, "explain", *pictures("pairs", runs), f"--workdir={runs('pairs').path}", *more))
    assert [one["class"] for one in found] == [f"a {c}" for c in outputs[:3].argmax(1)]


def test_the_report_has_the_sections_of_several_labels(runs, capsys, tmp_path):
    printed(capsys, "report", f"--workdir={runs('pairs').path}", f"--html={tmp_path / 'a.html'}")
    page = (tmp_path / "a.html").read_text()
    assert "test mean average precision" in page
    assert "accuracy" not in page.replace("train/accuracy", "")
    for text in ("best threshold", "Average precision and decisions of each class"):
        assert text in page
    assert "left out" not in page


@pytest.mark.thorough
def test_export_says_the_task(runs, capsys, tmp_path):
    printed(capsys, "export", tmp_path / "a.stablehlo", f"--workdir={runs('pairs').path}")
    with zipfile.ZipFile(tmp_path / "a.stablehlo") as file:
        described = json.loads(file.read("metadata.json"))
    assert [described["gives"], described["task"]] == ["probabilities", "multilabel"]


@pytest.mark.thorough
def test_serve_answers_by_the_task(runs, pictures):
    model = restore(runs("pairs").load_config(), runs("pairs"), "latest")
    _, outputs = outputs_of(runs("pairs"))
    with TestClient(app.build(model)) as client:
        [answer] = client.post("/predict", files={"images": pictures("pairs", runs)[0].read_bytes()}).json()
    assert len(answer["predictions"]) == (outputs[0] >= 0.5).sum()

"""`launch.py features`, `probe` and `explain`: their files and output for a trained run and for weights."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import imgclf_jax
import launch
from imgclf_jax.data import sources
from imgclf_jax.data.source import read_examples
from imgclf_jax.tools.explain import attribution, explanations
from imgclf_jax.tools.probe import command as probe

FLAGS = ["--config.total=60 steps", "--config.model=cnn(widths=(4,), hidden=8)", "--config.schedule=constant(1e-2)",
         "--config.preprocess=decode(1)", "--config.eval_every=", "--config.checkpoint_every=",
         "--config.augment=normalize"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    workdir = tmp_path_factory.mktemp("digits") / "run"
    assert launch.main([*FLAGS, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, one_device):
    """A run of two seeds."""
    workdir = tmp_path_factory.mktemp("seeds") / "run"
    assert launch.main([*FLAGS, f"--workdir={workdir}", "--config.num_seeds=2"]) == 0
    return workdir


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Digits of three classes in folders named after them, one in another folder, and a broken one."""
    monkeypatch.chdir(tmp_path)
    examples = read_examples(sources.digits()["test"], np.arange(6))
    for i, (image, label) in enumerate(zip(examples["image"], examples["label"], strict=True)):
        folder = tmp_path / "photos" / (str(label) if i else "unknown")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    return tmp_path / "photos"


def load(file):
    with np.load(file) as arrays:
        return dict(arrays)


@pytest.mark.thorough
def test_features_of_the_evaluation_sets_and_of_a_split(run, tmp_path):
    """Those of the library for the same images, in order, with their labels."""
    test = sources.digits()["test"]
    expected = read_examples(test, np.arange(360))
    model = imgclf_jax.load(run)
    assert launch.main(["features", f"--workdir={run}", f"--output={tmp_path / 'a.npz'}"]) == 0
    found = load(tmp_path / "a.npz")
    np.testing.assert_allclose(found["features"], model.features(expected["image"]), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["labels"], expected["label"])
    assert found["names"].tolist() == [str(i) for i in range(360)]
    assert set(found["sets"]) == {"test"}
    assert found["class_names"].tolist() == list("0123456789")
    flags = ["features", f"--workdir={run}", f"--output={tmp_path / 'b.npz'}", "--split=test[5:9]"]
    assert launch.main(flags) == 0
    np.testing.assert_array_equal(load(tmp_path / "b.npz")["features"], found["features"][5:9])


def test_features_of_files(run, photos, tmp_path, capsys):
    """Folders named like a class give labels; a broken image is skipped, named, and the status is 1."""
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert launch.main(["features", "photos", f"--workdir={run}", "--output=a.npz"]) == 1
    out, err = capsys.readouterr()
    assert "a.npz: features of 6 images" in out
    assert "error: photos/broken.png: " in err
    assert "error: 1 of 7 images failed" in err
    found = load(tmp_path / "a.npz")
    places = {name: i for i, name in enumerate(found["names"].tolist())}
    examples = read_examples(sources.digits()["test"], np.arange(6))
    folders = ["unknown", *examples["label"][1:].astype(str)]
    order = [places[f"photos/{folder}/{i}.png"] for i, folder in enumerate(folders)]
    assert found["labels"][order].tolist() == [-1, *examples["label"][1:].tolist()]
    expected = imgclf_jax.load(run).features(examples["image"])
    np.testing.assert_allclose(found["features"][order], expected, rtol=1e-5, atol=1e-5)


def probed(flags, capsys):
    capsys.readouterr()
    assert launch.main(["probe", "--format=json", "--draws=2", *flags]) == 0
    printed = capsys.readouterr()
    out = json.loads(printed.out) | {"log": printed.err}
    return out, {(r["method"], r.get("k", r.get("shots"))): r for r in out["results"]}


@pytest.mark.thorough
def test_probe(run, capsys, monkeypatch):
    """Neighbors as in scikit-learn."""
    monkeypatch.setattr(probe.probing, "STRENGTHS", (0.01, 1.0))
    out, found = probed([f"--workdir={run}", "--k=1,3"], capsys)
    assert (out["step"], out["train_examples"], out["features"]) == (60, 1437, 8)
    model, digits = imgclf_jax.load(run), sources.digits()
    (x, y), (test, truth) = ((model.features(s.read(np.arange(s.size))["image"]), s.labels) for s in digits.values())
    neighbors = KNeighborsClassifier(3, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(x, y)
    assert found["nearest neighbors", 3]["mean"] == pytest.approx(neighbors.score(test, truth), abs=1 / 360)
    assert found["linear probe", None]["C"] in ([0.01], [1.0])
    assert found["linear probe", None]["deviation"] is None
    few = [found["few images", shots] for shots in (1, 5, 10, 25)]
    assert all(len(r["accuracies"]) == 2 for r in few)
    assert few[0]["mean"] < few[-1]["mean"] <= 1
    assert few[0]["deviation"] == pytest.approx(np.std(few[0]["accuracies"], ddof=1))


@pytest.mark.thorough
def test_probe_of_weights_for_other_classes_and_of_several_seeds(run, seeds, capsys, monkeypatch, tmp_path):
    """Weights need no head; each seed of a run counts. With few images per class, larger probes are left out."""
    monkeypatch.setattr(probe.probing, "STRENGTHS", (1.0,))
    config = tmp_path / "c.py"
    config.write_text("from imgclf_jax.config import default_config as get_config\n")
    flags = [f"--config={config}", *FLAGS, f"--config.init_from={run}", "--config.data.source=fake(24, (8, 8, 1), 3)"]
    _, found = probed(flags, capsys)
    assert {shots for method, shots in found if method == "few images"} == {1, 5}
    assert found["linear probe", None]["mean"] > 0.5
    out, found = probed([f"--workdir={seeds}", "--k=2,201", "--config.data.train=train[:200]"], capsys)
    assert "skipping 201 neighbors, because there are only 200 training images" in out["log"]
    assert (len(found["nearest neighbors", 2]["accuracies"]), len(found["few images", 1]["accuracies"])) == (2, 4)


def explained(flags, capsys):
    capsys.readouterr()
    status = launch.main(["explain", "--format=json", *flags])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.thorough
def test_explain(run, photos, capsys):
    """The class and probability of the model, the map of the pure function, and a picture of each image."""
    status, records = explained(["photos", f"--workdir={run}", "--output=heat"], capsys)
    assert status == 0
    model = imgclf_jax.load(run)
    probabilities = model.predict([record["file"] for record in records])
    assert [r["class"] for r in records] == [model.class_names[best] for best in probabilities.argmax(1)]
    assert [r["probability"] for r in records] == pytest.approx(probabilities.max(1).tolist(), abs=1e-6)
    assert {r["method"] for r in records} == {"gradcam"}
    for file in {r["picture"] for r in records}:
        with Image.open(file) as picture:
            assert picture.size[0] > 2 * 256
    assert len({r["picture"] for r in records}) == 6
    # In batches of 8, with a class for each: the maps of the pure function.
    some, labels = read_examples(sources.digits()["test"], np.arange(9))["image"], np.arange(9, dtype=np.int32)
    classifier, augment = model.programs.recipe.model, model.programs.recipe.augment(train=False)
    seen = attribution.inspect(classifier, {"params": model.state.params}, (8, 8, 1))
    pure = attribution.make_gradcam(classifier, augment, attribution.choose_layer(seen))
    found = explanations.build(model)[1](some, labels)
    np.testing.assert_allclose(found, pure(*model.state.evaluated, some, labels), atol=1e-5)


@pytest.mark.thorough
def test_explain_another_class_and_by_occlusion(run, seeds, photos, capsys):
    """For several seeds, the drop of their mean probability. Two images of one name have two figures."""
    for folder in ("x", "y"):
        shutil.copytree(photos / "unknown", photos / folder)
    flags = ["photos/x", "photos/y", f"--workdir={seeds}", "--method=occlusion", "--class=4", "--window=3"]
    status, records = explained(flags, capsys)
    assert status == 0
    assert [r["picture"] for r in records] == ["explained/0.4.occlusion.png", "explained/0.4-2.occlusion.png"]
    model = imgclf_jax.load(seeds)
    image = model.prepare("photos/x/0.png")
    [found] = attribution.occlusion(model.predict, image[None], np.array([4]), 3)
    assert records[0]["greatest"] == pytest.approx(found.max(), abs=1e-5)
    assert records[0]["probability"] == pytest.approx(model.predict(image)[0, 4], abs=1e-6)
    launch.main(["features", "--split=test[:9]", f"--workdir={seeds}", "--output=b.npz"])
    assert load("b.npz")["features"].shape == (2, 9, 8)


@pytest.mark.parametrize(("words", "message"), [
    (["features"], "--output=: name an .npz file to write"),
    (["features", "--output=a.npz", "--split=test", "photos"], "drop one"),
    (["explain", "photos", "--class=eleven"], "unknown class 'eleven'"),
    (["explain", "photos", "--layer=block7"], "unknown layer with feature maps 'block7': did you mean 'block0'"),
    (["explain", "photos", "--method=occlusion", "--layer=block0"], "--layer needs --method=gradcam"),
    (["probe", "--k=3,x"], "--k=3,x: must be a number of neighbors"),
])  # fmt: skip
def test_mistakes(run, photos, capsys, words, message):
    assert launch.main([*words, f"--workdir={run}"]) == 1
    assert message in capsys.readouterr().err

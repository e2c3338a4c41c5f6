"""`launch.py features` and `probe`: their files and output for a trained run and for weights."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import imgclf_jax
import launch
from imgclf_jax import config as configs
from imgclf_jax.data import sources
from imgclf_jax.data.source import read_examples
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.probe import command, probing
from imgclf_jax.tools.probe import command as probe


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
def test_probe_of_weights_for_other_classes_and_of_several_seeds(run, seeds, flags, capsys, monkeypatch, tmp_path):
    """Weights need no head; each seed of a run counts. With few images per class, larger probes are left out."""
    monkeypatch.setattr(probe.probing, "STRENGTHS", (1.0,))
    config = tmp_path / "c.py"
    config.write_text("from imgclf_jax.config import default_config as get_config\n")
    source = "--config.data.source=fake(24, (8, 8, 1), 3)"
    _, found = probed([f"--config={config}", *flags, f"--config.init_from={run}", source], capsys)
    assert {shots for method, shots in found if method == "few images"} == {1, 5}
    assert found["linear probe", None]["mean"] > 0.5
    out, found = probed([f"--workdir={seeds}", "--k=2,201", "--config.data.train=train[:200]"], capsys)
    assert "skipping 201 neighbors, because there are only 200 training images" in out["log"]
    assert (len(found["nearest neighbors", 2]["accuracies"]), len(found["few images", 1]["accuracies"])) == (2, 4)
    launch.main(["features", "--split=test[:9]", f"--workdir={seeds}", f"--output={tmp_path / 'b.npz'}"])
    assert load(tmp_path / "b.npz")["features"].shape == (2, 9, 8)


def clouds(n, seed, spread=2.5, classes=4, d=6):
    """Overlapping clouds of points f32[n, d], and their classes."""
    centres = np.random.default_rng(0).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n).astype(np.int32)
    return (centres[labels] + spread / 2 * rng.normal(size=(n, d))).astype(np.float32), labels


TRAIN, LABELS = clouds(200, 1)
TEST, TRUTH = clouds(150, 2)


def test_neighbors_vote_as_scikit_learns_do():
    """Cosine similarity and votes of exp(similarity / 0.07)."""
    found = probing.nearest_neighbors(TRAIN, LABELS, TEST, [1, 7, 20, 200], 4)
    for k, predicted in found.items():
        model = KNeighborsClassifier(k, metric="cosine", algorithm="brute",
                                     weights=lambda distance: np.exp((1 - distance) / 0.07))  # fmt: skip
        expected = model.fit(TRAIN.astype(np.float64), LABELS).predict(TEST.astype(np.float64))
        np.testing.assert_array_equal(predicted, expected)
    assert 0.4 < (found[20] == TRUTH).mean() < 0.95
    assert (found[1] != found[200]).any()


def test_the_linear_probe_is_scikit_learns(monkeypatch):
    """Standardized by the training set alone, with C by cross-validation on it."""
    monkeypatch.setattr(probing, "STRENGTHS", (1e-4, 1e-2, 100.0))
    strength = probing.choose_strength(TRAIN, LABELS)
    search = GridSearchCV(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
                          {"logisticregression__C": list(probing.STRENGTHS)},
                          cv=StratifiedKFold(5, shuffle=True, random_state=0))  # fmt: skip
    search.fit(TRAIN, LABELS)
    assert strength == search.best_params_["logisticregression__C"]
    assert min(probing.STRENGTHS) < strength < max(probing.STRENGTHS)
    probe = probing.linear_probe(TRAIN, LABELS, strength)
    np.testing.assert_array_equal(probe.predict(TEST), search.predict(TEST))
    alone = [np.flatnonzero(c == LABELS)[0] for c in range(4)]
    assert probing.choose_strength(TRAIN[alone], LABELS[alone]) == 1.0  # no class has two examples


def test_a_probe_of_a_rare_label_is_fitted(monkeypatch):
    monkeypatch.setattr(probing, "_MAX_TO_CHOOSE", 50)
    monkeypatch.setattr(probing, "STRENGTHS", (1e-2, 1.0))
    targets = np.zeros((200, 3), np.float32)
    targets[[3, 7], 0] = targets[5, 1] = targets[np.random.default_rng(0).permutation(200)[0], 2] = 1
    decision = probing.one_vs_rest(TRAIN, targets)(TRAIN)
    assert decision.shape == (200, 3)
    assert set(np.argsort(-decision[:, 0])[:40]) >= {3, 7}


def test_a_few_of_each_class_are_drawn():
    """This many of each, others for each draw, and the same again for the same draw."""
    draws = [probing.draw_few(LABELS, 5, draw) for draw in range(3)]
    for draw in draws:
        assert len(set(draw.tolist())) == 20
        assert np.bincount(LABELS[draw]).tolist() == [5] * 4
    assert len({tuple(draw) for draw in draws}) == 3
    np.testing.assert_array_equal(draws[1], probing.draw_few(LABELS, 5, 1))


def test_a_probe_that_is_fitted_to_what_it_is_scored_on_warns(tmp_path):
    base, config = sources.fake(100, (2, 2, 1), 2), configs.default_config()
    config.data.eval = {"test": "test"}
    (tmp_path / "config.json").write_text(configs.to_json(config))
    workdir = Workdir(tmp_path)
    assert command._overlaps(config, workdir, base) == command._overlaps(config, None, base) == []
    config.data.train, config.data.sampling = "train+test[:10]", "subset('ids.npy')"  # which probes do not follow
    for place in (workdir, None):
        [sentence] = command._overlaps(config, place, base)
        assert sentence.startswith("the evaluation set test shares 10 of its 100 examples with data.train=")
    config.data.train, config.data.eval = "train", {"val": "train[90%:]"}
    assert command._overlaps(config, workdir, base) == []  # `compare_with_record` has said it
    assert len(command._overlaps(config, None, base)) == 1

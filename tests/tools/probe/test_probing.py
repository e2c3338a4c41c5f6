"""Probes of features against scikit-learn and plain loops."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from imgclf_jax import config as configs
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.probe import accuracy_plot, command, probing


def clouds(n, seed, spread=2.5, classes=4, d=6):
    """Overlapping clouds of points f32[n, d], and their classes."""
    centres = np.random.default_rng(0).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n).astype(np.int32)
    return (centres[labels] + spread / 2 * rng.normal(size=(n, d))).astype(np.float32), labels


TRAIN, LABELS = clouds(200, 1)
TEST, TRUTH = clouds(150, 2)


def test_neighbors_vote_as_scikit_learns_do(monkeypatch):
    """Cosine similarity and votes of exp(similarity / 0.07), a few test rows at a time."""
    monkeypatch.setattr(probing, "_CHUNK", 1000)
    found = probing.nearest_neighbors(TRAIN, LABELS, TEST, [1, 7, 20, 200], 4)
    for k, predicted in found.items():
        model = KNeighborsClassifier(k, metric="cosine", algorithm="brute",
                                     weights=lambda distance: np.exp((1 - distance) / 0.07))  # fmt: skip
        expected = model.fit(TRAIN.astype(np.float64), LABELS).predict(TEST.astype(np.float64))
        np.testing.assert_array_equal(predicted, expected)
    assert 0.4 < (found[20] == TRUTH).mean() < 0.95
    assert (found[1] != found[200]).any()


def test_of_equal_neighbors_the_first_count():
    """Four examples are identical; a row of zeros is similar to nothing."""
    train = np.array([[1, 0], [2, 0], [3, 0], [4, 0], [0, 1]], np.float32)
    test = np.array([[1, 0], [0, 0]], np.float32)
    found = probing.nearest_neighbors(train, np.array([2, 1, 1, 1, 0]), test, [1, 2, 3], 3)
    assert found[1].tolist() == [2, 2]
    assert found[2].tolist() == [1, 1]  # one vote each: the first class
    assert found[3].tolist() == [1, 1]


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
    mean, deviation = TRAIN.astype(np.float64).mean(0), TRAIN.astype(np.float64).std(0)
    direct = LogisticRegression(C=strength, max_iter=1000).fit((TRAIN - mean) / deviation, LABELS)
    np.testing.assert_array_equal(probe.predict(TEST), direct.predict((TEST - mean) / deviation))


def test_the_choice_of_c_with_few_and_with_many_examples(monkeypatch):
    few = np.flatnonzero(LABELS == 0)[:1].tolist() + np.flatnonzero(LABELS == 1)[:9].tolist()
    assert probing.choose_strength(TRAIN[few], LABELS[few]) == 1.0  # only one class has two examples
    monkeypatch.setattr(probing, "_MAX_TO_CHOOSE", 50)
    monkeypatch.setattr(probing, "STRENGTHS", (1e-2, 1.0))
    sizes = []
    monkeypatch.setattr(probing, "_classifier", lambda c: sizes.append(c) or LogisticRegression(C=c, max_iter=1000))
    assert probing.choose_strength(TRAIN, LABELS) in probing.STRENGTHS
    assert sizes == list(probing.STRENGTHS)


def chosen_with(monkeypatch, labels, most=50):
    """The classes (and their sizes) and the number of folds of the cross-validation of C for these labels."""
    asked = []
    monkeypatch.setattr(probing, "_MAX_TO_CHOOSE", most)
    monkeypatch.setattr("sklearn.model_selection.cross_val_score",
                        lambda model, x, y, cv: asked.append((y.tolist(), cv.n_splits)) or np.ones(1))  # fmt: skip
    labels = np.asarray(labels)
    probing.choose_strength(np.zeros((len(labels), 1), np.float32), labels)
    assert len(asked) == len(probing.STRENGTHS)
    used, folds = asked[0]
    return dict(zip(*np.unique(used, return_counts=True), strict=True)), folds


@pytest.mark.parametrize(("positives", "folds"), [(2, 2), (3, 3), (5, 5), (9, 5)])
def test_c_is_chosen_with_every_class_however_rare(monkeypatch, positives, folds):
    """A draw of 50 of 2,000 has hardly any of two positives: each class keeps up to five."""
    counts, used = chosen_with(monkeypatch, np.isin(np.arange(2000), np.arange(positives) * 200))
    assert used == folds
    assert sum(counts.values()) == 50
    assert counts[True] >= min(positives, 5)


def test_c_is_chosen_without_the_classes_of_one_image_and_with_as_many_classes_as_fit(monkeypatch):
    labels = np.repeat(np.arange(20), 30)
    counts, folds = chosen_with(monkeypatch, labels)  # 100 for five of each: 10 classes fit
    assert folds == 5
    assert list(counts.values()) == [5] * 10
    counts, folds = chosen_with(monkeypatch, np.append(labels, 99), 150)
    assert folds == 5
    assert list(counts) == list(range(20))
    assert sum(counts.values()) == 150
    few = [0] * 4 + [1] * 6 + [2]
    assert chosen_with(monkeypatch, few) == ({0: 4, 1: 6}, 4)


def test_a_probe_of_a_rare_label_is_fitted(monkeypatch, caplog):
    """It was a traceback of scikit-learn, "All the 5 fits failed": no positive was drawn."""
    monkeypatch.setattr(probing, "_MAX_TO_CHOOSE", 50)
    caplog.set_level("INFO")
    targets = np.zeros((200, 2), np.float32)
    targets[[3, 7], 0] = targets[5, 1] = 1
    decision = probing.one_vs_rest(TRAIN, targets)(TRAIN)
    assert decision.shape == (200, 2)
    assert set(np.argsort(-decision[:, 0])[:40]) >= {3, 7}
    assert caplog.text.count("using C = 1, because cross-validation needs two classes") == 1  # the second label


def test_a_probe_that_does_not_converge_is_named(monkeypatch, caplog):
    monkeypatch.setattr(probing, "_ITERATIONS", 1)
    probing.linear_probe(TRAIN, LABELS, 100.0)
    assert "stopped before its optimum, after 1 iterations" in caplog.text


def test_a_few_of_each_class_are_drawn():
    """This many of each, others for each draw, and the same again for the same draw."""
    draws = [probing.draw_few(LABELS, 5, draw) for draw in range(3)]
    for draw in draws:
        assert len(set(draw.tolist())) == 20
        assert np.bincount(LABELS[draw]).tolist() == [5] * 4
    assert len({tuple(draw) for draw in draws}) == 3
    np.testing.assert_array_equal(draws[1], probing.draw_few(LABELS, 5, 1))


def test_the_plot_shows_means_and_deviations(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="it comes with the extra `plot`")
    made = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *args, **kw: made.append(self) or save(self, *args, **kw)
    )
    few = [
        {"method": "few images", "shots": s, "mean": m, "deviation": d} for s, m, d in ((1, 0.5, 0.1), (5, 0.7, 0.05))
    ]
    lines = [{"method": "nearest neighbors", "k": k, "mean": m, "deviation": None} for k, m in ((1, 0.9), (20, 0.8))]
    records = [{"set": of} | r for of in ("val", "test") for r in (*few, *lines)]
    accuracy_plot.draw(tmp_path / "a.png", records, "a title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    panels = made[0].axes
    assert [panel.get_title() for panel in panels] == ["val", "test"]
    points, *others = panels[0].get_lines()
    assert np.array(points.get_xydata()).tolist() == [[1, 0.5], [5, 0.7]]
    assert any(line.get_label() == "nearest neighbors, k = 20, all images" and line.get_ydata()[0] == 0.8
               for line in others)  # fmt: skip


def test_images_of_one_class_teach_no_probe():
    """It was a traceback of scikit-learn."""
    features = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    with pytest.raises(UserError, match="all 9 training images are of one class"):
        list(command.probe(features, np.full(9, 2, np.int32), {}, [1], 1, 3, None))


def test_a_probe_that_is_fitted_to_what_it_is_scored_on_warns(tmp_path):
    """Only the training split of the run was compared, and with weights of a file none: 1-NN then has accuracy 1."""
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

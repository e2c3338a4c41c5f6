"""Probes of features against scikit-learn and plain loops."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from imgclf_jax import config as configs
from imgclf_jax.data import sources
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.probe import command, probing


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

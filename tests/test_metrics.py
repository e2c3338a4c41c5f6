"""Metrics of batches and of whole sets, against scikit-learn, and through evaluation's padded batches."""

import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from scored import predictions, score
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    recall_score,
    roc_auc_score,
    top_k_accuracy_score,
)

import launch
from imgclf_jax import losses, metrics
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources
from imgclf_jax.losses import Task
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.scores import classification
from imgclf_jax.scores.classification import Predictions
from imgclf_jax.tools.evaluate import listing
from imgclf_jax.tools.report import top_losses
from imgclf_jax.train.evaluation import evaluate, evaluate_all
from imgclf_jax.trained import restore


def random_set(classes, n=200):
    """Labels of unequal counts, and informative probabilities with ties."""
    rng = np.random.default_rng(classes)
    share = np.arange(1, classes + 1) / sum(range(classes + 1))
    labels = np.concatenate([np.arange(classes), rng.choice(classes, n, p=share)])
    raw = np.round(rng.random((len(labels), classes)) + 0.5 * np.eye(classes)[labels], 1) + 0.1
    return labels, raw / raw.sum(1, keepdims=True)


def test_an_absent_class():
    """It has no area: AUC is the mean over the others, here and in the scores of `evaluate`."""
    labels, probabilities = random_set(3)
    labels, probabilities = labels[labels != 1], probabilities[labels != 1]
    areas = [roc_auc_score(labels == c, probabilities[:, c]) for c in (0, 2)]
    assert classification.auc(predictions(labels, probabilities)) == pytest.approx(np.mean(areas), abs=1e-12)
    assert classification.auc(predictions(labels, probabilities)) == score(labels, probabilities)["auc"]
    assert 0 < classification.balanced_accuracy(predictions(labels, probabilities)) < 1
    assert np.isnan(classification.auc(predictions(labels[labels == 2], probabilities[labels == 2])))


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_scikit_learn_agrees_where_it_defines_them(classes):
    """Its own averages, under its own names."""
    labels, probabilities = random_set(classes)
    given = probabilities[:, 1] if classes == 2 else probabilities
    area = roc_auc_score(labels, given, multi_class="ovr", average="macro")
    assert classification.auc(predictions(labels, probabilities)) == pytest.approx(area, abs=1e-12)
    found = probabilities.argmax(1)
    recall = balanced_accuracy_score(labels, found)
    assert classification.balanced_accuracy(predictions(labels, probabilities)) == pytest.approx(recall, abs=1e-12)
    harmonic = f1_score(labels, found, average="binary" if classes == 2 else "macro")
    assert classification.f1(predictions(labels, probabilities)) == pytest.approx(harmonic, abs=1e-12)


@pytest.mark.parametrize("seeds", [2, *thorough(1)])
def test_scores_are_of_the_predictions_that_are_counted(seeds):
    """From logits, whose order float32 probabilities may lose: the sigmoid of 20 and of 30 is 1."""
    logits = np.float32([[20, 30, 40, 50, 60, 70, 80]] * 7)
    logits[6] = np.nan
    labels, mask = jnp.arange(7), jnp.arange(7) != 2
    both = logits if seeds == 1 else np.stack([logits, -logits, logits])
    sums = jax.vmap(metrics.classification_sums, (0, None, None, None))(jnp.asarray(both), labels, {}, mask) if (
        seeds > 1) else metrics.classification_sums(jnp.asarray(both), labels, {}, mask)  # fmt: skip
    batch = metrics.predict(jnp.asarray(both), labels, losses.SIGMOID, mask)
    everything = metrics.concatenate([Predictions(*map(np.asarray, batch))])
    whole_set = metrics.build_whole_set("balanced_accuracy|f1")
    counted = metrics.summarize(jax.device_get(sums), everything, whole_set)
    own = everything.for_seed(-1) if seeds > 1 else everything
    found = {name: value[0] for name, value in own.compute(np.ones((1, 6))).items()}
    ensemble = "ensemble_" if seeds > 1 else ""
    assert found["accuracy"] == counted[f"{ensemble}accuracy"] == counted[f"{ensemble}balanced_accuracy"] == 0
    assert found["top5"] == counted[f"{ensemble}top5"] == 3 / 6  # labels 3, 4 and 5 of the six that are counted
    rows = listing.rows("test", "abdefg", own, "0123456", 1)
    assert [(row["class_1"], row["correct"]) for row in rows] == [*[("6", False)] * 5, ("0", False)]


@pytest.mark.parametrize("text", ["aucc", "auc(3)", "auc|auc"])
def test_bad_specs(text):
    with pytest.raises(UserError, match="auc"):
        metrics.build_whole_set(text)


@pytest.mark.parametrize("name", ["loss", "nll", "accuracy", "examples", "top5", "f1_std", "ensemble_f1"])
def test_an_own_metric_takes_no_name_that_results_use(name, monkeypatch):
    """It used to replace the loss in result.json, and `f1_std` was read as a standard deviation."""
    monkeypatch.setitem(sys.modules, "own", types.SimpleNamespace(**{name: lambda labels, probabilities: 0.0}))
    with pytest.raises(UserError, match=f"results use the name {name} for something else"):
        metrics.build_whole_set(f"own:{name}")


@pytest.mark.parametrize("seeds", [1, 2])
def test_independent_classes_are_ordered_by_their_logits(seeds):
    """A float32 sigmoid is 1 above 17: AUC was 0.5 for logits that separate the classes, and their listing by index."""
    labels = np.array([0, 1, 0, 1])
    logits = np.array([[20, 18, 25], [18, 21, 30], [23, 18.5, 24], [19, 22, 18]], np.float32)
    more = np.stack([logits] * (seeds + 1)) if seeds > 1 else logits
    found = metrics.predict(jnp.asarray(more), jnp.asarray(labels), losses.SIGMOID, jnp.ones(4, bool))
    own = metrics.concatenate([jax.device_get(found)])
    own = own.for_seed(-1) if seeds > 1 else own
    assert (own.probabilities == 1).all()
    # Class 0: 20 and 23 against 18 and 19; class 1: 21 and 22 against 18 and 18.5.
    assert classification.auc(own) == 1
    assert classification.auc(predictions(own.labels, own.probabilities)) == 0.5
    rows = listing.rows("test", "abcd", own, "012", 3)
    assert ["".join(row[f"class_{rank}"] for rank in (1, 2, 3)) for row in rows] == ["201", "210", "201", "102"]


@pytest.mark.parametrize(("seeds", "classes"), [(1, 2), (2, 2), (1, 3)])
def test_exclusive_classes_are_ordered_by_their_log_odds(seeds, classes):
    """A float32 softmax is 1 from a gap of 17 on: the AUC of class 1 was 0.5 for logits that separate the classes."""
    labels, logits = np.array([0, 1, 0, 1]), np.zeros((4, classes), np.float32)
    logits[:, 1] = [20, 22, 21, 120]
    more = np.stack([logits] * (seeds + 1)) if seeds > 1 else logits
    found = metrics.predict(jnp.asarray(more), jnp.asarray(labels), losses.SOFTMAX, jnp.ones(4, bool))
    own = metrics.concatenate([jax.device_get(found)])
    own = own.for_seed(-1) if seeds > 1 else own
    assert (own.probabilities[:, 1] == 1).all()
    assert metrics.build_whole_set("auc")["auc"](own) == 1
    assert classification.auc(own) == 1
    assert classification.auc(predictions(own.labels, own.probabilities)) < 1


@pytest.mark.parametrize("link", [losses.SOFTMAX, losses.SIGMOID])
def test_the_highest_losses_are_of_the_logits(link):
    """Float32 probabilities are 0 from a gap of about 90 on: losses of 110, 90 and 250 were all inf, in set order."""
    logits = jnp.float32([[0, 110], [0, 90], [0, 250], [3, 1], [40, 0]])
    labels = jnp.zeros(5, jnp.int32)
    found = metrics.concatenate([jax.device_get(metrics.predict(logits, labels, link, jnp.ones(5, bool)))])
    gaps = np.float64([110, 90, 250, -2, -40]) if link is losses.SOFTMAX else np.float64([0, 0, 0, -3, -40])
    expected = np.log1p(np.exp(-abs(gaps))) + np.maximum(gaps, 0)
    np.testing.assert_allclose(top_losses.label_losses(found), expected, rtol=1e-6)
    if link is losses.SOFTMAX:
        assert top_losses.highest_losses(found, 4).tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("value", [None, "0.5", [0.5], np.ones(1), True, 1j])
def test_an_own_metric_returns_one_number(value, monkeypatch):
    """result.json accepted anything, and a complex number ended the run in a traceback after training."""
    own = types.SimpleNamespace(score=lambda labels, probabilities: value)
    monkeypatch.setitem(sys.modules, "own", own)
    made = predictions(np.zeros(2, np.int32), np.ones((2, 2)) / 2)
    with pytest.raises(UserError, match=r"the metric own:score returns .*; it must return one real number"):
        metrics.build_whole_set("own:score")["score"](made)
    own.score = lambda labels, probabilities: np.float32(0.5)
    assert metrics.build_whole_set("own:score")["score"](made) == 0.5


def test_every_metric_says_which_value_is_best():
    """Only loss and NLL are best when low; an own metric must declare its direction."""
    assert set(metrics.BEST) == {"accuracy", "loss", "nll", "top5", *classification.METRICS}
    assert [name for name, which in metrics.BEST.items() if which == "min"] == ["loss", "nll"]
    assert metrics.parse_best("val/loss") == ("val/loss", -1.0)
    assert metrics.parse_best("val/auc") == ("val/auc", 1.0)
    assert metrics.parse_best("min:val/error") == ("val/error", -1.0)
    for name in ("error", "brier_loss", "calibration_error"):
        with pytest.raises(UserError, match=f"write 'min:val/{name}' if the smallest .* 'max:val/{name}'"):
            metrics.parse_best(f"val/{name}")


@pytest.mark.parametrize("task", Task)
def test_the_best_metric_is_one_that_evaluation_reports(task):
    """A misspelled name kept no checkpoint, and with `stop` ended the run in a traceback."""
    for kind in ("acuracy", "loss[ink]", "mean_average_precision" if task is Task.SOFT else "kl"):
        with pytest.raises(UserError, match=rf"stop=.*has no {re.escape(kind)}; it has loss, "):
            metrics.check_best(f"val/{kind}", "stop", task, ("ink", "brightness"))


@pytest.mark.parametrize("arguments", [
    "threshold=(0.3, 0.4)", "threshold='a'", "threshold=(0.3, 'a', 0.4)", "threshold=None", "threshold=((0.3,), 0.4)",
    "average='weighted'", "average=2",
])  # fmt: skip
def test_the_arguments_of_f1_are_checked_before_a_run(arguments):
    """They were checked at the first evaluation, after an epoch of training."""
    with pytest.raises(UserError) as e:
        metrics.build_whole_set(f"auc|f1({arguments})", Task.MULTILABEL, ("a", "b", "c"))
    assert str(e.value).startswith("metrics: f1(threshold=")
    assert "threshold must be a number or 3 of them, one per class, and average 'macro' or 'micro'" in str(e.value)


@pytest.mark.parametrize("arguments", ["", "0.3", "threshold=(0.3, 0.4, 1)", "threshold=1, average='micro'"])
def test_the_arguments_that_f1_takes(arguments):
    names = metrics.build_whole_set(f"f1({arguments})", Task.MULTILABEL, ("a", "b", "c"))
    assert names.keys() == {"", "f1"}


def test_a_run_asks_for_the_direction_before_data_are_opened(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_error.py").write_text("def error(labels, probabilities):\n    return 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("imgclf_jax.datasets.sources.open_splits", None)
    argv = ["--config.metrics=own_error:error", f"--workdir={tmp_path}/run"]
    assert launch.main([*argv, "--config.checkpoint.best=test/error"]) == 1
    assert capsys.readouterr().err == (
        "error: checkpoint.best='test/error': write 'min:test/error' if the smallest value of your metric is best, or "
        "'max:test/error' if the greatest is\n"
    )


@pytest.mark.thorough
def test_of_a_run(tmp_path, capsys):
    """In result.json and from `evaluate`, over 101 examples in batches of 16; the best checkpoint by AUC is kept."""
    argv = [f"--workdir={tmp_path}", "--config.data.source=fake(101, (8, 8, 1), 2)", "--config.preprocess=decode(1)",
            "--config.model=mlp(widths=(8,))", "--config.total=12 steps", "--config.batch_size=16",
            "--config.eval_every=4 steps", "--config.metrics=auc|balanced_accuracy|f1",
            "--config.checkpoint.best=test/auc"]  # fmt: skip
    assert launch.main(argv) == 0
    workdir = Workdir(tmp_path)
    programs, state, _ = restore(workdir.load_config(), workdir, "latest")
    source = sources.open_splits(workdir.load_config().data.source)["test"]
    images = programs.eval_images(source)
    _, predictions = evaluate(programs, state, images)
    examples = source.read(np.arange(101))
    np.testing.assert_array_equal(predictions.labels, examples["label"])
    pixels = examples["image"].astype(np.float32) / np.float32(255)
    logits = jax.jit(programs.recipe.model.apply)({"params": state.params}, pixels)
    np.testing.assert_allclose(predictions.probabilities, jax.nn.softmax(logits), rtol=1e-5, atol=1e-6)
    expected = roc_auc_score(predictions.labels, predictions.probabilities[:, 1])
    result = json.loads(workdir.result.read_text())["test"]
    assert result["auc"] == pytest.approx(expected, abs=1e-12)
    assert {"balanced_accuracy", "f1"} < set(result)
    broken = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    found = evaluate_all(programs, broken, {"test": images})["test"]
    assert (found["examples"], found["accuracy"], found["balanced_accuracy"], found["f1"]) == (101, 0, 0, 0)
    assert np.isnan([found["loss"], found["auc"]]).all()
    assert "the outputs of 101 examples are NaN or infinite" in capsys.readouterr().err
    assert launch.main(["evaluate", f"--workdir={tmp_path}", "--checkpoint=latest", "--format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["auc"] == result["auc"]


def sums_of(logits, labels, mask=True):
    """The sums of a batch; the loss of an example is its number."""
    logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.int32)
    args = (logits, labels, {"loss": jnp.arange(len(labels), dtype=jnp.float32)}, jnp.broadcast_to(mask, len(labels)))
    return jax.device_get(jax.jit(metrics.classification_sums)(*args))


@pytest.mark.parametrize("classes", [3, 12])
def test_classification_sums_agree_with_scikit_learn(classes):
    """Over the unmasked rows only; masked ones have NaN and wrong labels, and change nothing."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, classes)), rng.integers(0, classes, 200)
    mask = rng.random(200) < 0.7
    kept, truth = logits[mask], labels[mask]
    logits[~mask], labels[~mask] = np.nan, 0
    sums = sums_of(logits, labels, mask)
    prediction = kept.argmax(1)
    confusion = confusion_matrix(truth, prediction, labels=range(classes))
    np.testing.assert_array_equal(sums["confusion"], confusion)
    assert sums["examples"] == mask.sum()
    assert sums["correct"] == accuracy_score(truth, prediction, normalize=False)
    assert sums["loss"] == np.flatnonzero(mask).sum()  # the losses are the rows' numbers
    assert ("top5" in sums) == (classes > 5)
    if classes > 5:
        top5 = top_k_accuracy_score(truth, kept, k=5, normalize=False, labels=range(classes))
        assert sums["top5"] == top5


def test_the_first_class_wins_a_tie():
    """So a model with equal logits for all classes predicts class 0."""
    logits = np.zeros((4, 3), np.float32)
    logits[3] = [0, 1, 1]
    sums = sums_of(logits, [0, 1, 2, 2])
    assert sums["correct"] == 1
    np.testing.assert_array_equal(sums["confusion"], [[1, 0, 0], [1, 0, 0], [1, 1, 0]])


def test_top5_ranks_ties_by_class_and_nan_above_all():
    """Of six tied classes the first five are included, as in a stable sort; NaN logits rank no class."""
    tied = np.ones((6, 6), np.float32)
    assert sums_of(tied, np.arange(6))["top5"] == 5
    ranks = np.argsort(-tied, kind="stable")[:, :5]
    assert sum(label in row for label, row in zip(range(6), ranks, strict=True)) == 5
    assert sums_of(tied * np.nan, np.arange(6))["top5"] == 0


BROKEN = {
    "all NaN": lambda row: row * np.nan,
    "one NaN, which argmax takes": lambda row: np.where(np.arange(row.size) == 0, np.nan, row),
    "one infinite": lambda row: np.where(np.arange(row.size) == 0, np.inf, row),
    "all minus infinity": lambda row: np.full_like(row, -np.inf),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_scores_nothing(kind):
    """Its examples are wrong and predicted to be of no class, that of the first class too; they are counted all the
    same."""
    logits = np.random.default_rng(0).normal(size=(14, 7)).astype(np.float32)
    labels = np.arange(14) % 7
    whole = sums_of(logits, labels)
    bad = np.arange(14) < 7  # one of each class
    sums = sums_of(np.stack([BROKEN[kind](row) if b else row for row, b in zip(logits, bad, strict=True)]), labels)
    rest = sums_of(logits[~bad], labels[~bad])
    assert (sums["examples"], rest["examples"]) == (14, 7)
    for name in ("correct", "top5", "confusion", "class_correct", "class_predicted"):
        np.testing.assert_array_equal(sums[name], rest[name])
    np.testing.assert_array_equal(sums["class_examples"], whole["class_examples"])
    assert classification.predicted_classes(BROKEN[kind](logits[:1])) == -1


@pytest.mark.parametrize("classes", [2, 4])
def test_whole_sets_with_nan(classes):
    """AUC is NaN; a row with NaN predicts no class. All-NaN rows score nothing."""
    labels, probabilities = random_set(classes)
    probabilities[labels == 0] = np.nan
    assert np.isnan(classification.auc(predictions(labels, probabilities)))
    found = np.where(labels == 0, -1, probabilities.argmax(1))
    recall = recall_score(labels, found, labels=range(classes), average="macro")
    assert classification.balanced_accuracy(predictions(labels, probabilities)) == pytest.approx(recall, abs=1e-12)
    counted = range(1, 2) if classes == 2 else range(classes)
    harmonic = f1_score(labels, found, labels=counted, average="macro", zero_division=0)
    assert classification.f1(predictions(labels, probabilities)) == pytest.approx(harmonic, abs=1e-12)
    nothing = predictions(labels, np.full_like(probabilities, np.nan))
    assert np.isnan(classification.auc(nothing))
    assert classification.balanced_accuracy(nothing) == classification.f1(nothing) == 0


def test_of_several_seeds_one_may_be_broken():
    """Its NaN makes the means NaN, without an error."""
    each = [sums_of(np.eye(3) * scale, np.arange(3)) for scale in (1, np.nan, 1)]
    sums = {name: np.stack([one[name] for one in each]) for name in each[0]}
    sums["loss"] = np.array([0.3, np.nan, np.inf])
    result = metrics.summarize(sums)
    assert (result["accuracy"], result["ensemble_accuracy"]) == (0.5, 1)
    assert np.isnan([result["loss"], result["loss_std"]]).all()
    sums["loss"] = np.array([0.3, np.inf, 0.3])
    assert metrics.summarize(sums)["loss"] == np.inf


@pytest.mark.parametrize("classes", [metrics.CONFUSION_CLASSES, metrics.CONFUSION_CLASSES + 1])
def test_the_confusion_matrix_has_a_limit(classes):
    """Above it, only per-class counts; up to it, they are the matrix's margins and diagonal."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, classes, 64)
    sums = sums_of(rng.normal(size=(64, classes)) + 4 * np.eye(classes)[labels], labels)
    assert 0 < sums["correct"] < 64
    np.testing.assert_array_equal(sums["class_examples"], np.bincount(labels, minlength=classes))
    assert sums["class_predicted"].sum() == 64
    assert sums["class_correct"].sum() == sums["correct"]
    assert ("confusion" in sums) == (classes <= metrics.CONFUSION_CLASSES)
    if "confusion" in sums:
        np.testing.assert_array_equal(sums["class_examples"], sums["confusion"].sum(1))
        np.testing.assert_array_equal(sums["class_predicted"], sums["confusion"].sum(0))
        np.testing.assert_array_equal(sums["class_correct"], np.diag(sums["confusion"]))
    else:
        assert max(np.size(value) for value in sums.values()) == classes

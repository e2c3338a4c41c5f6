"""Metrics of whole sets, against their definitions, and through evaluation's padded batches."""

import json

import jax
import numpy as np
import pytest

import launch
from imgclf_jax import metrics
from imgclf_jax.commands.evaluate import evaluate, restore
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources
from imgclf_jax.run.workdir import Workdir


def random_set(classes, n=200):
    """Labels of unequal counts, and probabilities with ties that know something of them."""
    rng = np.random.default_rng(classes)
    share = np.arange(1, classes + 1) / sum(range(classes + 1))
    labels = np.concatenate([np.arange(classes), rng.choice(classes, n, p=share)])
    raw = np.round(rng.random((len(labels), classes)) + 0.5 * np.eye(classes)[labels], 1) + 0.1
    return labels, raw / raw.sum(1, keepdims=True)


def area(positive, values):
    """How often a positive example has the greater value than a negative one, half of the ties (Mann and Whitney)."""
    ours, theirs = values[positive][:, None], values[~positive][None]
    return np.mean((ours > theirs) + 0.5 * (ours == theirs))


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_definitions(classes):
    labels, probabilities = random_set(classes)
    each = range(1, 2) if classes == 2 else range(classes)
    expected = np.mean([area(labels == c, probabilities[:, c]) for c in each])
    assert metrics.auc(labels, probabilities) == pytest.approx(expected, abs=1e-12)

    found = probabilities.argmax(1)
    recall = [np.mean(found[labels == c] == c) for c in range(classes)]
    assert metrics.balanced_accuracy(labels, probabilities) == pytest.approx(np.mean(recall), abs=1e-12)

    def f1(c):
        right = np.sum((found == c) & (labels == c))
        return 2 * right / (np.sum(found == c) + np.sum(labels == c))

    assert metrics.f1(labels, probabilities) == pytest.approx(np.mean([f1(c) for c in each]), abs=1e-12)


def test_an_absent_class():
    labels, probabilities = random_set(3)
    there = labels != 1
    assert np.isnan(metrics.auc(labels[there], probabilities[there]))
    assert 0 < metrics.balanced_accuracy(labels[there], probabilities[there]) < 1


@pytest.mark.parametrize("text", ["aucc", "auc(3)", "auc|auc"])
def test_bad_specs(text):
    with pytest.raises(UserError, match="auc"):
        metrics.build_whole_set(text)


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
    sums = evaluate(programs, state, images)
    examples = source.read(np.arange(101))
    np.testing.assert_array_equal(sums["labels"], examples["label"])
    pixels = examples["image"].astype(np.float32) / np.float32(255)
    logits = programs.recipe.model.apply({"params": state.params}, pixels)
    np.testing.assert_allclose(sums["probabilities"], jax.nn.softmax(logits), rtol=1e-5, atol=1e-6)
    expected = area(sums["labels"] == 1, sums["probabilities"][:, 1])
    result = json.loads(workdir.result.read_text())["test"]
    assert result["auc"] == pytest.approx(expected, abs=1e-12)
    assert {"balanced_accuracy", "f1"} < set(result)
    capsys.readouterr()
    assert launch.main(["evaluate", f"--workdir={tmp_path}", "--checkpoint=latest", "--format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["auc"] == result["auc"]

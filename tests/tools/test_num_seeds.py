"""Several seeds in one program: each replica equals its own run, and the ensemble averages their probabilities."""

import json
import statistics

import jax
import numpy as np
import pytest

import launch
from imgclf_jax import datasets
from imgclf_jax.data import sources
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train.evaluation import evaluate
from imgclf_jax.trained import restore
from imgclf_jax.weights import pretrained

SOURCE = "fake(50, (12, 12, 1), 4)"
RUN = (f"--config.data.source={SOURCE}", "--config.model=cnn(widths=(4,), hidden=8)", "--config.total=9 steps",
       "--config.batch_size=16", "--config.preprocess=decode(1)|random_resized_crop(10)",
       "--config.preprocess_eval=decode(1)|resize(10)", "--config.augment=flip_alternating|pad_crop(1)|normalize",
       "--config.mix=mixup(0.2)", "--config.optimizer=sgd(momentum=0.9)|lookahead(2, 0.5)", "--config.seed=5",
       "--config.schedule=cosine(0.1)", "--config.metrics=auc")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds at once, and each alone, on eight devices."""
    folder = tmp_path_factory.mktemp("seeds")
    settings = {"together": "--config.num_seeds=2", "5": "--config.seed=5", "6": "--config.seed=6"}
    for name, more in settings.items():
        assert launch.main([f"--workdir={folder / name}", *RUN, more]) == 0
    return {name: Workdir(folder / name) for name in settings}


def state_of(workdir):
    return restore(workdir.load_config(), workdir, "latest")


@pytest.mark.thorough
def test_each_replica_is_its_run(runs):
    _, together, _ = state_of(runs["together"])
    for i in range(2):
        _, alone, _ = state_of(runs[str(5 + i)])
        replica = jax.tree.map(lambda x, i=i: x[i], together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), replica, alone)


@pytest.mark.thorough
def test_results(runs):
    """Means and standard deviations of the single runs' results, and the ensemble's from averaged probabilities."""
    result = json.loads(runs["together"].result.read_text())["test"]
    alone = [json.loads(runs[str(s)].result.read_text())["test"] for s in (5, 6)]
    for name in ("accuracy", "loss", "nll", "auc"):
        values = [one[name] for one in alone]
        assert result[name] == pytest.approx(statistics.fmean(values), rel=1e-4)
        assert result[f"{name}_std"] == pytest.approx(statistics.stdev(values), rel=1e-3, abs=1e-6)
    assert result["examples"] == 50
    probabilities = []
    for seed in (5, 6):
        programs, state, _ = state_of(runs[str(seed)])
        images = datasets.eval_images(sources.open_splits(SOURCE)["test"], programs.recipe.config)
        _, predictions = evaluate(programs, state, images)
        probabilities.append(predictions.probabilities)
    mean = np.mean(probabilities, 0, np.float64)
    labels = predictions.labels
    assert result["ensemble_accuracy"] == np.mean(mean.argmax(1) == labels)
    assert result["ensemble_loss"] == pytest.approx(-np.mean(np.log(mean[np.arange(50), labels])), rel=1e-4)
    together, *alone = (next(r for r in read_metrics(runs[name].metrics) if "train/loss" in r)
                        for name in ("together", "5", "6"))  # fmt: skip
    values = [one["train/loss"] for one in alone]
    assert together["train/loss"] == pytest.approx(statistics.fmean(values), rel=1e-4)
    assert together["train/loss_std"] == pytest.approx(statistics.stdev(values), rel=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["5", "together"])
def test_every_replica_begins_from_the_weights(runs, name):
    """From a run of one seed; from a run of several, the first seed's."""
    config = runs["5"].load_config()
    with config.unlocked():
        config.num_seeds, config.init_from = 3, str(runs[name].path)
    programs = Programs(Recipe(config, runs["5"].load_data_info()))
    state = programs.init_state(weights=pretrained.load(programs).taken)
    expected, _ = state_of(runs["5"])[1].evaluated
    for i in range(3):
        own = jax.tree.leaves(jax.tree.map(lambda a, i=i: a[i], state.params))
        for a, b in zip(own, jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

"""Several labels an example, numbers and distributions, through every tool: made of scikit-learn's digits."""

import json

import numpy as np
import pytest
import sklearn.metrics
from cases import thorough
from sklearn.datasets import load_digits

import launch
from imgclf_jax import losses, metrics
from imgclf_jax.commands.evaluation import evaluate
from imgclf_jax.data import sources
from imgclf_jax.loading import restore
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics

N, TRAIN = 304, 240
FLAGS = ("--config.preprocess=decode(1)", "--config.augment=normalize", "--config.model=mlp(widths=(32,))",
         "--config.batch_size=48", "--config.total=10 epochs", "--config.schedule=constant(1e-2)",
         "--config.log_every=5 epochs", "--config.eval_every=5 epochs", "--config.checkpoint_every=5 epochs",
         "--config.tensorboard=False")  # fmt: skip
LOSS = {"pairs": "sigmoid", "ink": "mse", "soft": "softmax"}
BEST = {"pairs": "test/mean_average_precision", "ink": "test/mae[top half, %]", "soft": "test/kl"}
DIGITS = load_digits()


def write_pairs(path):
    """Two digits side by side; ten columns say which digits there are."""
    images = (DIGITS.images * 255 / 16).astype(np.uint8)
    left, right = np.random.default_rng(0).integers(0, len(images), (2, N))
    targets = np.zeros((N, 10), np.uint8)
    for side in (left, right):
        targets[np.arange(N), DIGITS.target[side]] = 1
    return save(path, np.concatenate([images[left], images[right]], 2), targets, [f"a {i}" for i in range(10)])


def write_ink(path):
    """How much ink a digit has, and the share of it in the upper half."""
    images = DIGITS.images[:N]
    targets = np.stack([images.mean((1, 2)), 100 * images[:, :4].sum((1, 2)) / images.sum((1, 2))], 1)
    return save(path, (images * 255 / 16).astype(np.uint8), targets, ["ink", "top half, %"])


def write_soft(path):
    """A digit's label with a share of 0.82, the others with 0.02 each."""
    targets = np.full((N, 10), 0.02)
    targets[np.arange(N), DIGITS.target[:N]] = 0.82
    images = (DIGITS.images[:N] * 255 / 16).astype(np.uint8)
    return save(path, images, targets, [str(i) for i in range(10)])


def save(path, images, targets, names):
    np.savez(path, train_images=images[:TRAIN], train_targets=targets[:TRAIN], test_images=images[TRAIN:],
             test_targets=targets[TRAIN:], target_names=names)  # fmt: skip
    return f"arrays({str(path)!r})"


WRITE = {"pairs": write_pairs, "ink": write_ink, "soft": write_soft}


def train(folder, name, *flags):
    source = WRITE[name](folder / f"{name}.npz")
    argv = [f"--workdir={folder / name}", f"--config.data.source={source}", f"--config.loss={LOSS[name]}", *FLAGS,
            f"--config.checkpoint.best={BEST[name]}", *flags]  # fmt: skip
    assert launch.main(argv) == 0
    return Workdir(folder / name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """run(name): the trained run of a set, trained once."""
    folder, known = tmp_path_factory.mktemp("tasks"), {}

    def run(name):
        if name not in known:
            known[name] = train(folder, name)
        return known[name]

    return run


def outputs_of(workdir):
    """(targets, probabilities or values), f64[64, k] each, of the test set."""
    model = restore(workdir.load_config(), workdir, "latest")
    images = model.programs.eval_images(sources.open_data(workdir.load_config())["test"])
    read = images.read(np.arange(len(images)), np.arange(len(images)))
    found = np.asarray(model.programs.predict(*model.state.evaluated, read["image"]))
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
    if name == "ink":
        return {
            "loss": sklearn.metrics.mean_squared_error(targets, outputs),
            "r2": sklearn.metrics.r2_score(targets, outputs),
            "mae": sklearn.metrics.mean_absolute_error(targets, outputs),
            "rmse": sklearn.metrics.root_mean_squared_error(targets, outputs),
            "mae[top half, %]": sklearn.metrics.mean_absolute_error(targets[:, 1], outputs[:, 1]),
        }
    nll = -np.sum(targets * np.log(outputs), 1).mean()
    return {
        "accuracy": np.mean(targets.argmax(1) == outputs.argmax(1)),
        "nll": nll,
        "kl": nll + np.sum(targets * np.log(targets), 1).mean(),
    }


@pytest.mark.parametrize("name", ["pairs", "ink", *thorough("soft")])
def test_training_records_the_metrics_of_the_task(runs, name):
    """The result, the log and the best checkpoint; the numbers are scikit-learn's, of what `predict` gives."""
    workdir = runs(name)
    result = json.loads(workdir.result.read_text())["test"]
    found = expected(name, *outputs_of(workdir))
    assert {key: result[key] for key in found} == {key: pytest.approx(x, rel=1e-5) for key, x in found.items()}
    assert result["examples"] == N - TRAIN
    logged = {key.partition("/")[2] for record in read_metrics(workdir.metrics) for key in record if "train/" in key}
    assert {"accuracy", "exact_match"} & logged == {"pairs": {"exact_match"}, "ink": set(), "soft": {"accuracy"}}[name]
    best = restore(workdir.load_config(), workdir, "best")
    value = BEST[name].partition("/")[2]
    sums, predictions = evaluate(best.programs, best.state, best.programs.eval_images(
        sources.open_data(workdir.load_config())["test"]))  # fmt: skip
    kept = metrics.summarize(sums, predictions, best.programs.recipe.whole_set_metrics)[value]
    values = [r[f"test/{value}"] for r in read_metrics(workdir.metrics) if f"test/{value}" in r]
    assert kept == pytest.approx(max(values) if name == "pairs" else min(values), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("pairs", ["--config.loss=softmax"], "adds up to 2 and not to 1; for columns that are 0 or 1 each by itself "
                                             "use 'sigmoid'"),
        ("ink", ["--config.loss=sigmoid"], "outside of [0, 1]; for numbers use 'mse', 'mae' or 'huber'"),
        ("ink", ["--config.mix=cutmix"], "mix='cutmix': cutmix has no target in a regression"),
        ("ink", ["--config.metrics=auc"], "unknown metric of a regression 'auc'"),
        ("pairs", ["--config.metrics=balanced_accuracy"], "unknown metric of several labels 'balanced_accuracy'"),
        ("ink", ["--config.checkpoint.best=test/accuracy"], "a run with a regression has no accuracy; it has "
                                                            "loss, r2, mae, rmse"),
        ("ink", ["--config.data.source=digits"], "loss='mse' trains on numbers, and these data have class labels"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_data_is_told(tmp_path, capsys, name, flags, said):
    source = WRITE[name](tmp_path / "data.npz")
    argv = [f"--workdir={tmp_path / 'run'}", f"--config.data.source={source}", f"--config.loss={LOSS[name]}", *FLAGS]
    assert launch.main([*argv, *flags]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", thorough("pairs", "ink", "soft"))
def test_several_seeds_report_means_and_their_ensemble(tmp_path, name):
    """An ensemble has the mean of the probabilities, in a regression that of the values; mixing and parts too."""
    workdir = train(tmp_path, name, "--config.num_seeds=2", "--config.mix=mixup(0.2)", "--config.accumulate=2")
    targets, together = outputs_of(workdir)
    model = restore(workdir.load_config(), workdir, "latest")
    images = model.programs.eval_images(sources.open_data(workdir.load_config())["test"])
    everything = np.arange(len(images))
    read = images.read(everything, everything)
    logits = np.asarray(model.programs.logits(*model.state.evaluated, read["image"]))
    each = np.asarray(losses.link_of(LOSS[name]).probabilities(logits), np.float64)
    np.testing.assert_allclose(each.mean(0), together, rtol=1e-5, atol=1e-6)
    result = json.loads(workdir.result.read_text())["test"]
    seeds = [expected(name, targets, own) for own in each]
    for key, value in expected(name, targets, together).items():
        assert result[f"ensemble_{key}"] == pytest.approx(value, rel=1e-4)
        assert result[key] == pytest.approx(np.mean([one[key] for one in seeds]), rel=1e-4)
        assert result[f"{key}_std"] == pytest.approx(np.std([one[key] for one in seeds], ddof=1), rel=1e-2, abs=1e-6)

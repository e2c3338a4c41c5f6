"""`evaluate --attack`: a linear model's worst case in closed form, exact counts, never mistaken for clean accuracy."""

import json

import jax
import numpy as np
import pytest

import launch
from imgclf_jax import datasets
from imgclf_jax.core import sharding
from imgclf_jax.methods import table
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.evaluate import attacked
from imgclf_jax.train.evaluation import open_evals
from imgclf_jax.trained import restore

EPS = 0.15
FGSM = f"pgd(eps={EPS}, steps=1, step_size={EPS}, random_start=False)"
SETTINGS = ("--config.preprocess=decode(1)", "--config.augment=flip_lr|normalize(0.4, 0.3)", "--config.batch_size=96",
            "--config.model=mlp(widths=())", "--config.total=6 epochs", "--config.schedule=constant(2e-2)",
            "--config.eval_every=6 epochs", "--config.data.eval.test=test[:50%]",
            "--config.tensorboard=False")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A softmax regression of the digits, 8 x 8, of one seed and of two; 180 of them are evaluated."""
    folder = tmp_path_factory.mktemp("attacked")
    for seeds in (1, 2):
        assert launch.main([f"--workdir={folder / str(seeds)}", *SETTINGS, f"--config.num_seeds={seeds}"]) == 0
    return Workdir(folder / "1"), Workdir(folder / "2")


@pytest.fixture(scope="module")
def linear(runs):
    return runs[0]


def printed(run, capsys, *words):
    capsys.readouterr()
    assert launch.main(["evaluate", f"--workdir={run.path}", "--format=json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def weights(run):
    """(images f64[n, pixels] with pixels from 0 to 1, labels, kernel, bias) of a linear run."""
    config = run.load_config()
    programs, state, _ = restore(config, run, "")
    (images,) = open_evals(programs, datasets.open_data(config)).values()
    places = np.arange(len(images))
    given, head = images.read(places, places), state.params["head"]
    flat = given["image"].reshape(len(images), -1) / 255.0
    return flat, given["label"], *(np.float64(head[name]) for name in ("kernel", "bias"))


@pytest.mark.thorough
def test_one_step_on_a_linear_model_is_the_closed_form(linear, capsys):
    """The gradient of the loss is kernel (p - onehot), so the step is eps times its sign, clipped to 0 to 1."""
    x, labels, kernel, bias = weights(linear)
    logits = (x - 0.4) / 0.3 @ kernel + bias
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    worst = np.clip(x + EPS * np.sign((p - np.eye(10)[labels]) @ kernel.T), 0, 1)
    of_worst = (worst - 0.4) / 0.3 @ kernel + bias
    nll = np.log(np.exp(of_worst).sum(1)) - of_worst[np.arange(len(x)), labels]
    before = sorted(linear.path.iterdir())
    found = printed(linear, capsys, f"--attack={FGSM}")
    assert sorted(linear.path.iterdir()) == before  # nothing that `compare` may take for clean predictions
    clean = printed(linear, capsys)
    assert found["test"]["examples"] == 180
    assert found["test"]["accuracy"] == clean["test"]["accuracy"] == np.mean(logits.argmax(1) == labels)
    assert found["test"]["nll"] == pytest.approx(clean["test"]["nll"], rel=1e-6)
    assert found["test"]["attacked_accuracy"] == np.mean(of_worst.argmax(1) == labels)
    assert found["test"]["attacked_nll"] == pytest.approx(nll.mean(), rel=1e-5)
    assert found["attack"] == FGSM
    assert found["step"] == clean["step"]


@pytest.mark.thorough
def test_other_batches_and_devices(linear, capsys):
    """One device, a batch size that does not divide the examples, and fewer examples than devices."""
    spec = "pgd(eps=0.1, steps=5)"
    found = printed(linear, capsys, f"--attack={spec}", "--config.data.eval.few=test[:3]")
    config = linear.load_config()
    programs, state, _ = restore(config, linear, "")
    with config.unlocked():
        config.batch_size, config.data.eval = 41, {"test": "test[:50%]", "few": "test[:3]"}
    one = sharding.make_mesh(jax.devices()[:1])
    alone = Programs(Recipe(config, programs.recipe.data), one)
    state = sharding.put_replicated(jax.tree.map(np.asarray, state), one)
    evaluate = alone.jitted(attacked.make_step(alone, table.build_attack(spec)))
    for name, images in open_evals(alone, datasets.open_data(config)).items():
        sums = attacked._evaluate(alone, state, evaluate, images, name)
        assert attacked._summarize(sums) == pytest.approx(found[name], rel=1e-5)
    assert found["few"]["examples"] == 3


@pytest.mark.thorough
def test_several_seeds_are_attacked_each_by_itself(runs, capsys):
    """The mean of two, of which the first is that of the run of one seed."""
    one, two = (printed(run, capsys, f"--attack={FGSM}")["test"] for run in runs)
    for name in ("accuracy", "nll", "attacked_accuracy", "attacked_nll"):
        assert abs(one[name] - two[name]) == pytest.approx(two[f"{name}_std"] / 2**0.5, rel=1e-3), name


@pytest.mark.thorough
@pytest.mark.parametrize(("words", "message"), [
    (["--attack=pdg"], "unknown attack 'pdg': did you mean 'pgd'"),
    (["--attack=pgd(eps=8)"], "pgd(eps=8): must be above 0 and at most 1"),
    (["--attack=pgd(epsilon=0.1)"], "unknown argument 'epsilon'"),
    (["--attack=pgd", "--corruptions=all"], "--corruptions and --attack print different things"),
])  # fmt: skip
def test_mistakes(linear, capsys, words, message):
    assert launch.main(["evaluate", f"--workdir={linear.path}", *words]) == 1
    assert message in capsys.readouterr().err

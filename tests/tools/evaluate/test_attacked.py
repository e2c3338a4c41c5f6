"""`evaluate --attack`: a linear model's worst case in closed form, exact counts, never mistaken for clean accuracy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.typing import DTypeLike

import launch
from imgclf_jax import datasets
from imgclf_jax.core import sharding
from imgclf_jax.methods import table
from imgclf_jax.models.layers import Conv, mean_pool
from imgclf_jax.models.norms import BatchNorm
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


def train(tmp_path_factory, *flags):
    workdir = tmp_path_factory.mktemp("attacked") / "run"
    assert launch.main([f"--workdir={workdir}", *SETTINGS, *flags]) == 0
    return Workdir(workdir)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A softmax regression of the digits, 8 x 8; 180 of them are evaluated."""
    return train(tmp_path_factory)


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
    found = printed(linear, capsys, f"--attack={FGSM}")
    clean = printed(linear, capsys)
    assert found["test"]["examples"] == 180
    assert found["test"]["accuracy"] == clean["test"]["accuracy"] == np.mean(logits.argmax(1) == labels)
    assert found["test"]["nll"] == pytest.approx(clean["test"]["nll"], rel=1e-6)
    assert found["test"]["attacked_accuracy"] == np.mean(of_worst.argmax(1) == labels)
    assert found["test"]["attacked_nll"] == pytest.approx(nll.mean(), rel=1e-5)
    assert found["attack"] == FGSM
    assert found["step"] == clean["step"]


@pytest.mark.thorough
def test_pixels_stay_in_the_ball_and_in_their_range(linear):
    """From random starts that follow from the example ids, whatever the batch."""
    programs, state, _ = restore(linear.load_config(), linear, "")
    images = jax.random.randint(jax.random.key(0), (24, 8, 8, 1), 0, 256).astype(jnp.uint8)
    seen = {}

    def keep(gradient, images, keys, low, high):
        found = table.build_attack("pgd(eps='20/255', steps=4)")(gradient, images, keys, low, high)
        seen["images"], seen["found"] = (x * 0.3 + 0.4 for x in (images, found))
        return found

    @jax.jit
    def attack(numbers):
        batch = {"image": images[numbers], "label": numbers % 10, "mask": numbers >= 0, "index": numbers}
        attacked.make_step(programs, keep)(*state.evaluated, batch)
        return seen["images"], seen["found"]

    clean, found = map(np.asarray, attack(jnp.arange(24)))
    assert np.abs(found - clean).max() == pytest.approx(20 / 255, abs=1e-6)
    assert -1e-6 <= found.min() < found.max() <= 1 + 1e-6
    _, some = attack(jnp.arange(7, 18))
    np.testing.assert_allclose(some, found[7:18], atol=1e-6)


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


class Normed(nn.Module):
    """Two convolutions with batch norm, of which the second has enough weights to be sharded."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        for i, width in enumerate((16, 128)):
            x = Conv(width, 3, dtype=self.dtype, name=f"conv{i}")(x)
            x = nn.relu(BatchNorm(0.9, dtype=self.dtype, name=f"norm{i}")(x, train))
        return mean_pool(x)


@pytest.mark.thorough
@pytest.mark.parametrize("more", [(), ("--config.mesh=fsdp=-1",), ("--config.precision=bfloat16",)])
def test_several_seeds_are_attacked_each_by_itself(tmp_path_factory, capsys, more):
    """The means of the two seeds attacked alone, with TTA views and batch statistics."""
    model = f"--config.model={__name__}:Normed"
    flags = (model, "--config.total=1 epochs", "--config.tta=flip", "--config.num_seeds=2")
    run, spec = train(tmp_path_factory, *flags, *more), "pgd(eps=0.05, steps=3)"
    both = printed(run, capsys, f"--attack={spec}", "--trust")["test"]
    config = run.load_config()
    programs, state, _ = restore(config, run, "")
    with config.unlocked():
        config.num_seeds = 1
    alone = Programs(Recipe(config, programs.recipe.data), programs.mesh)
    evaluate = alone.jitted(attacked.make_step(alone, table.build_attack(spec)))
    ((name, images),) = open_evals(alone, datasets.open_data(config)).items()
    each = []
    for seed in range(2):
        own = jax.tree.map(lambda x: np.asarray(x)[seed], state)  # noqa: B023
        each.append(attacked._summarize(attacked._evaluate(alone, own, evaluate, images, name)))
    for name in ("accuracy", "nll", "attacked_accuracy", "attacked_nll"):
        values = [one[name] for one in each]
        assert both[name] == pytest.approx(np.mean(values), rel=1e-2), name
        assert both[f"{name}_std"] == pytest.approx(np.std(values, ddof=1), abs=1e-2), name
    assert both["attacked_nll"] > both["nll"]


def keeps_nan(gradient, images, keys, low, high):
    """An attack that fails."""
    return images * jnp.nan


@pytest.mark.thorough
def test_an_attack_without_a_result_is_an_error(linear, capsys):
    words = ["evaluate", f"--workdir={linear.path}", "--trust", f"--attack={__name__}:keeps_nan"]
    assert launch.main(words) == 1
    assert "makes NaN or infinite pixels in 180 examples of test" in capsys.readouterr().err


@pytest.mark.thorough
def test_it_writes_nothing_that_compare_may_take_for_clean_predictions(linear, capsys):
    before = sorted(linear.path.iterdir())
    printed(linear, capsys, "--attack=pgd(steps=1)")
    assert sorted(linear.path.iterdir()) == before


@pytest.mark.thorough
@pytest.mark.parametrize(("words", "message"), [
    (["--attack=pgd(eps=8)"], "pgd(eps=8): must be above 0 and at most 1"),
    (["--attack=pgd(epsilon=0.1)"], "unknown argument 'epsilon'"),
    (["--attack=pgd", "--corruptions=all"], "--corruptions and --attack print different things"),
    (["--attack=pgd", "--predictions=a.csv"], "--attack and --predictions print different things"),
    (["--attack=pgd", "--checkpoints=all"], "--checkpoints and --attack print different things"),
])  # fmt: skip
def test_mistakes(linear, capsys, words, message):
    assert launch.main(["evaluate", f"--workdir={linear.path}", *words]) == 1
    assert message in capsys.readouterr().err

"""A user's own method, gradient function and sown values: right, and with all that a run promises."""

import json
import shutil

import digests
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import thorough
from digests import Way
from flax import linen as nn
from prototypes import Prototypes

import launch
from imgclf_jax import losses, step
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.methods import Loss, Method
from imgclf_jax.models.classifier import Classifier
from imgclf_jax.optim import optimizers
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train import loop as train
from imgclf_jax.trained import load_teacher

pytestmark = pytest.mark.optimized

SHAPE, CLASSES = (8, 8, 1), 5
DATA = DataInfo(64, (12, 12, 1), ("a", "b", "c", "d"), "")


def prototypes(problem, weight=0.5):
    """Cross-entropy, and the squared distance to the mean of the own class; two views, one of them noisy."""

    def loss(model, batch, fixed):
        features = model.features(batch["image"], train=True)
        logits = model.head(features)
        projected = model.projector(model.features(batch["noisy"], train=True))
        own = jax.nn.one_hot(batch["label"], problem.classes)
        means = model.means.value
        counts = own.sum(0)[:, None]
        seen = jnp.where(counts > 0, own.T @ projected / jnp.maximum(counts, 1), means)
        model.means.value = jax.lax.stop_gradient(0.9 * means + 0.1 * seen)
        distance = jnp.sum((projected - means[batch["label"]]) ** 2, -1)
        values = problem.supervised(logits, batch) + weight * distance
        return Loss(values, logits, {"distance": distance, "fixed": jnp.mean(fixed["offset"])})

    def inputs(key, batch, augment):
        assert {"image", "label", "id", "epoch", "step"} <= batch.keys()
        first, second, noise = jax.random.split(key, 3)
        noisy = augment(second, batch["image"]) + 0.1 * jax.random.normal(noise, batch["image"].shape)
        return {**batch, "image": augment(first, batch["image"]), "noisy": noisy}

    def model(backbone, problem):
        return Prototypes(backbone, problem.classes, head_init=problem.head_init)

    def evaluate(model, batch, fixed):
        projected = model.projector(model.features(batch["image"]))
        return {"spread": jnp.sum((projected - model.means.value[batch["label"]]) ** 2, -1) + fixed["offset"][0]}

    return Method(loss, inputs, model, evaluate, fixed=lambda: {"offset": np.arange(3, dtype=np.float32)})


def plain(problem):
    """Supervised learning, written as a method."""

    def loss(model, batch, fixed):
        logits = model(batch["image"], train=True)
        return Loss(problem.supervised(logits, batch), logits)

    return Method(loss)


def sam(gradient, rho=0.05):
    """As a researcher writes it (Foret et al. 2021, arXiv:2010.01412)."""

    def sharp(params, model_state, batch, key):
        out, grads = gradient(params, model_state, batch, key)
        scale = rho / (optax.tree.norm(grads) + 1e-12)
        return out, gradient(jax.tree.map(lambda p, g: p + scale * g, params, grads), model_state, batch, key)[1]

    return sharp


class Sowing(nn.Module):
    """Sows a loss and a metric."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(nn.Dense(6)(x.reshape(len(x), -1)))
        self.sow("losses", "activity", 0.1 * jnp.mean(x**2, -1))
        self.sow("metrics", "rank", jnp.mean(jnp.abs(x)))
        return x


def line_search(learning_rate):
    return optax.chain(optax.sgd(learning_rate), optax.scale_by_backtracking_linesearch(5))


def on_plateau(learning_rate):
    return optax.chain(optax.sgd(learning_rate), optax.contrib.reduce_on_plateau(patience=1, cooldown=0))


def momo(learning_rate):
    return optax.contrib.momo(learning_rate)


def lbfgs(learning_rate):
    return optax.lbfgs(memory_size=3)


def mechanize(learning_rate):
    return optax.contrib.mechanize(optax.adamw(learning_rate))


def config_of(config, **more):
    config.model, config.tensorboard = "mlp(widths=(8,))", False
    with config.unlocked():
        config.update(more)
    return config


def run(folder, config):
    assert train.main(config, Workdir(folder)) == 0
    return json.loads((folder / "result.json").read_text())


def batch(seed=0, n=32):
    rng = np.random.default_rng(seed)
    return {"image": rng.integers(0, 256, (n, *SHAPE), np.uint8), "label": rng.integers(0, CLASSES, n, np.int32)}


def scale(key, images):
    return images.astype(jnp.float32) / 255


def one_step(backbone, learned=losses.softmax, **more):
    """(state before, state after, window) of one step of plain SGD at rate 1, whose update is the gradient."""
    model, optimizer = Classifier(backbone, CLASSES), optax.sgd(1.0)
    state = step.init_state(model, optimizer, SHAPE, 0)
    train_step = step.make_train_step(model, learned, optimizer, optax.constant_schedule(1.0), scale, **more)
    return state, *jax.jit(train_step)(state, batch())


def test_supervised_learning_as_a_method_is_the_default(fake_config, tmp_path):
    """The same bits; but `mix` and accumulation are those of the default as well."""
    more = {"mix": "mixup(0.2)", "accumulate": 2, "augment": "flip_lr|normalize"}
    default = run(tmp_path / "default", config_of(fake_config, **more))
    own = run(tmp_path / "own", config_of(fake_config, method=f"{__name__}:plain"))
    assert own["params_sha256"] == default["params_sha256"]
    assert own["test"] == default["test"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sown_losses_are_added_and_sown_metrics_are_logged(accumulate):
    """Beside the sum by hand."""
    before, after, window = one_step(Sowing(), accumulate=accumulate)
    model, given = Classifier(Sowing(), CLASSES), batch()

    def by_hand(params):
        logits, sown = model.apply({"params": params}, scale(None, given["image"]), mutable=["losses", "metrics"])
        activity, rank = sown["losses"]["backbone"]["activity"][0], sown["metrics"]["backbone"]["rank"][0]
        return jnp.mean(losses.softmax(logits, given["label"]) + activity), rank

    (loss, rank), grads = jax.value_and_grad(by_hand, has_aux=True)(before.params)
    assert float(window["loss"]) / 32 == pytest.approx(float(loss), rel=1e-6)
    assert float(window["backbone/rank"]) / 32 == pytest.approx(float(rank), rel=1e-6)
    jax.tree.map(lambda p, g, q: np.testing.assert_allclose(p - g, q, atol=1e-6), before.params, grads, after.params)
    assert "losses" not in after.model_state
    assert "metrics" not in after.model_state


def test_a_gradient_function_is_that_of_the_paper(fake_config, tmp_path):
    """SAM in ten lines of one's own: the gradient at w + rho g / |g|, by hand."""
    wrap = lambda gradient: step.Gradient(sam(gradient), gradient.images)  # noqa: E731
    before, after, _ = one_step(Sowing(), gradient=wrap)
    model, given = Classifier(Sowing(), CLASSES), batch()

    def loss(params):
        logits, sown = model.apply({"params": params}, scale(None, given["image"]), mutable=["losses"])
        return jnp.mean(losses.softmax(logits, given["label"]) + sown["losses"]["backbone"]["activity"][0])

    grads = jax.grad(loss)(before.params)
    away = 0.05 / np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    sharp = jax.grad(loss)(jax.tree.map(lambda p, g: p + away * g, before.params, grads))
    jax.tree.map(lambda p, g, q: np.testing.assert_allclose(p - g, q, atol=1e-6), before.params, sharp, after.params)


@pytest.mark.parametrize("make", [line_search, on_plateau, momo, *thorough(lbfgs, mechanize)])
def test_an_optimizer_gets_the_loss_and_its_function(make):
    """Three steps, beside optax called by hand on the same batch."""
    model, given = Classifier(Sowing(), CLASSES), batch()
    rate = optax.constant_schedule(0.5)
    optimizer = optimizers.build(f"{__name__}:{make.__name__}", rate, 0.0)
    state = step.init_state(model, optimizer, SHAPE, 0)
    train_step = jax.jit(step.make_train_step(model, losses.softmax, optimizer, rate, scale))

    def loss(params):
        logits, sown = model.apply({"params": params}, scale(None, given["image"]), mutable=["losses"])
        return jnp.mean(losses.softmax(logits, given["label"]) + sown["losses"]["backbone"]["activity"][0])

    @jax.jit
    def by_hand(params, opt_state):
        with jax.numpy_dtype_promotion("standard"):
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = plain.update(grads, opt_state, params, value=value, grad=grads, value_fn=loss)
            return optax.apply_updates(params, updates), opt_state

    plain, params = optax.with_extra_args_support(make(rate)), state.params
    opt_state = plain.init(params)
    for _ in range(3):
        state, _ = train_step(state, given)
        params, opt_state = by_hand(params, opt_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state.params, params)


@pytest.mark.parametrize(
    "more",
    [{}, *thorough({"num_seeds": 2}, {"accumulate": 2}, {"mesh": "fsdp=-1"}, {"gradient": f"{__name__}:sam(0.1)"})],
)
def test_a_method_with_state_keeps_all_promises(more, tmp_path):
    """Cadences, chunks, placement and a resume from the middle change no bit of parameters or state."""
    ways = [Way("1 steps", 1), Way("5 steps", 3), Way("", 0, "device")]
    resumed = [(ways[0], Way("1 steps", 3))]
    keys = {"model": "mlp(widths=(64,))", "method": f"{__name__}:prototypes", "augment": "flip_lr|normalize", **more}
    found = digests.train_in_ways(tmp_path, "cnn", "float32", ways, resumed, **keys)
    assert len({digest for _, digest in found}) == 1, found
    logged: dict[str, float] = {}
    for record in read_metrics(tmp_path / "1" / "metrics.jsonl"):
        logged |= record
    assert {"train/distance", "train/fixed"} <= logged.keys()
    assert logged["train/fixed"] == 1.0
    result = json.loads((tmp_path / "0" / "result.json").read_text())["test"]
    assert result["spread"] > 0
    assert result["accuracy"] >= 0


@pytest.mark.thorough
def test_several_seeds_are_single_runs(fake_config, tmp_path):
    keys = {"method": f"{__name__}:prototypes", "augment": "flip_lr|normalize"}
    both = run(tmp_path / "both", config_of(fake_config.copy_and_resolve_references(), num_seeds=2, **keys))
    each = [run(tmp_path / str(seed), config_of(fake_config.copy_and_resolve_references(), seed=seed, **keys))
            for seed in (0, 1)]  # fmt: skip
    mean = np.mean([one["test"]["spread"] for one in each])
    assert both["test"]["spread"] == pytest.approx(mean, rel=1e-4)
    assert "ensemble_spread" not in both["test"]
    assert both["test"]["loss"] == pytest.approx(np.mean([one["test"]["loss"] for one in each]), rel=1e-4)


def teaching(problem, run=""):
    """Learns from the logits of another run."""
    teacher = problem.load(run)

    def loss(model, batch, fixed):
        logits = model(batch["image"], train=True)
        wanted = jax.nn.softmax(teacher.apply(fixed, batch["image"]))
        return Loss(losses.softmax(logits, wanted), logits)

    return Method(loss, fixed=lambda: teacher.variables)


def test_a_teacher_is_read_in_training_only(fake_config, tmp_path, capsys):
    """Its variables are an argument of the program; a changed teacher is refused; without it evaluation works."""
    old, new = tmp_path / "teacher", tmp_path / "student"
    run(old, config_of(fake_config))
    config = config_of(fake_config, method=f"{__name__}:teaching({str(old)!r})", total="6 steps")
    run(new, config)
    recorded = json.loads((new / "provenance.json").read_text())["fixed_sha256"]
    assert len(recorded) == 64
    recipe = Recipe(config, DATA, load_teacher)
    programs = Programs(recipe, sharding.make_mesh(jax.devices()[:1]))
    shapes = [x.aval.shape for x in programs.train_step.jaxpr.jaxpr.constvars]
    assert (144, 8) not in shapes  # the kernel of the teacher
    _ = programs.traced_train
    assert "fixed" not in vars(programs)  # so that it compiles for devices that hold no arrays

    shutil.rmtree(old)
    run(old, config_of(fake_config, method="supervised", total="12 steps", seed=7))
    with pytest.raises(UserError, match=r"its fixed arrays have changed since the run in .* began"):
        train.main(config_of(fake_config, method=f"{__name__}:teaching({str(old)!r})", total="6 steps", seed=0),
                   Workdir(new))  # fmt: skip
    shutil.rmtree(old)
    assert launch.main(["evaluate", "--workdir", str(new), "--trust"]) == 0
    assert "accuracy" in capsys.readouterr().out


def no_loss(problem):
    return Method(loss="softmax")


def not_a_method(problem):
    return {"loss": 1}


def scalar(problem):
    return Method(lambda model, batch, fixed: Loss(jnp.mean(model(batch["image"], train=True))))


def bare(problem):
    return Method(lambda model, batch, fixed: jnp.mean(model(batch["image"], train=True), -1))


def matrix(problem):
    def loss(model, batch, fixed):
        logits = model(batch["image"], train=True)
        return Loss(logits[:, 0], logits, {"confusion": logits})

    return Method(loss)


def taken(problem):
    def loss(model, batch, fixed):
        logits = model(batch["image"], train=True)
        return Loss(logits[:, 0], logits, {"grad_norm": logits[:, 0]})

    return Method(loss)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("method", "supervized", "unknown method 'supervized'"),
        ("method", f"{__name__}:prototypes(weigth=1)", "unknown argument 'weigth': did you mean 'weight'"),
        ("method", f"{__name__}:no_loss", "its loss is a str; pass a function"),
        ("method", f"{__name__}:not_a_method", "returns a dict; return imgclf_jax.methods.Method"),
        ("method", f"{__name__}:scalar", r"values of the shape \[\]; return one number per example"),
        ("method", f"{__name__}:bare", "the method's loss returns a .*; return imgclf_jax.methods.Loss"),
        ("method", f"{__name__}:matrix", r"the metric 'confusion' has the shape \[16, 4\]"),
        ("method", f"{__name__}:taken", "a metric is called 'grad_norm', which every step has; rename it"),
        ("gradient", "sharp", "unknown gradient 'sharp'"),
        ("gradient", f"{__name__}:sam(roh=1)", "unknown argument 'roh': did you mean 'rho'"),
    ],
)
def test_a_mistake_is_one_sentence(key, value, said, fake_config, tmp_path):
    with pytest.raises(UserError, match=said):
        train.main(config_of(fake_config, **{key: value}), Workdir(tmp_path))

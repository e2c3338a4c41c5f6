"""A user's own method, gradient function and sown values: correct, and with all promises of a run."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from cases import thorough, trained_for
from flax import linen as nn
from stepped import CLASSES, SHAPE, batch, one_step, scale, write_module

from imgclf_jax import losses, metrics, step
from imgclf_jax.core.errors import UserError
from imgclf_jax.methods import Loss, Method
from imgclf_jax.models.classifier import Classifier
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.provenance import DataInfo
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import command as train
from imgclf_jax.train import evaluation


def plain(problem):
    """Supervised learning, written as a method."""

    def loss(model, batch, fixed):
        logits = model(batch["image"], train=True)
        return Loss(problem.supervised(logits, batch), logits)

    return Method(loss)


def softmax_loss(model, batch, fixed):
    logits = model(batch["image"], train=True)
    return Loss(losses.softmax(logits, batch["label"]), logits)


class Sowing(nn.Module):
    """Sows a loss and a metric."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(nn.Dense(6)(x.reshape(len(x), -1)))
        self.sow("losses", "activity", 0.1 * jnp.mean(x**2, -1))
        self.sow("metrics", "rank", jnp.mean(jnp.abs(x)))
        return x


def config_of(config, **more):
    config.model, config.tensorboard = "mlp(widths=(8,))", False
    with config.unlocked():
        config.update(more)
    return config


def test_supervised_learning_as_a_method_is_the_default(fake_config):
    """The same bits after a step, also with mixing and accumulation."""
    fake_config.update({"mix": "mixup(0.2)", "model": f"{__name__}:Sowing"})
    methods = []
    for fake_config.method in ("supervised", f"{__name__}:plain"):
        recipe = Recipe(fake_config, DataInfo(64, SHAPE, tuple("abc"), ""))
        methods.append(one_step(Sowing(), recipe.method, mix=recipe.mix, accumulate=2))
    jax.tree.map(np.testing.assert_array_equal, *methods)


def in_bfloat16(problem):
    """A loss and a metric of evaluation from the features of a bfloat16 backbone, which are not widened."""

    def loss(model, batch, fixed):
        return Loss(jnp.mean(model.features(batch["image"], train=True) ** 2, -1))

    def evaluate(model, batch, fixed):
        return {"power": jnp.full(batch["mask"].shape, 0.3, jnp.bfloat16)}

    return Method(loss, evaluate=evaluate, predicts=False)


def test_losses_and_metrics_in_bfloat16_are_summed_in_float32(fake_config):
    """A sum of 48 values of 0.3 in bfloat16 is off by more than a value; so is one that is cut to whole numbers."""
    fake_config.update({"precision": "bfloat16", "method": f"{__name__}:in_bfloat16"})
    programs, _, images, state = trained_for(fake_config, 1)
    sums, _ = evaluation.evaluate(programs, state, images)
    exact = float(jnp.bfloat16(0.3))
    assert float(sums[metrics.OWN + "power"]) / len(images) == pytest.approx(exact, rel=1e-6)
    assert programs.zero_sums()["loss"].dtype == jnp.float32


@pytest.mark.thorough
@pytest.mark.parametrize("accumulate", [1, 2])
def test_sown_losses_are_added_and_sown_metrics_are_logged(accumulate):
    before, after, window = one_step(Sowing(), accumulate=accumulate)
    model, given = Classifier(Sowing(), CLASSES), batch()

    def by_hand(params):
        logits, sown = model.apply({"params": params}, scale(None, given["image"]), mutable=["losses", "metrics"])
        activity, rank = sown["losses"]["backbone"]["activity"][0], sown["metrics"]["backbone"]["rank"][0]
        return jnp.mean(losses.softmax(logits, given["label"]) + activity), rank

    (loss, rank), grads = jax.value_and_grad(by_hand, has_aux=True)(before.params)
    assert float(window["loss"]) / 16 == pytest.approx(float(loss), rel=1e-6)
    assert float(window["backbone/rank"]) / 16 == pytest.approx(float(rank), rel=1e-6)
    jax.tree.map(lambda p, g, q: np.testing.assert_allclose(p - g, q, atol=1e-6), before.params, grads, after.params)
    assert not {"losses", "metrics"} & set(after.model_state)


def test_each_microbatch_has_dropout_of_its_own():
    drawn = set()

    def loss(model, batch, fixed):
        jax.debug.callback(lambda bits: drawn.add(int(bits)), jax.random.bits(model.make_rng("dropout")))
        return softmax_loss(model, batch, fixed)

    one_step(learned=Method(loss), accumulate=4)
    jax.effects_barrier()
    assert len(drawn) == 4


@pytest.mark.parametrize("place", ["device", *thorough("host")])
def test_a_memory_of_each_example(place, fake_config, tmp_path, monkeypatch):
    """The page's `elr`: with constant weights, after two epochs each row is 1 - 0.7² of the prediction."""
    write_module("my_memories.py", tmp_path, monkeypatch)
    config = config_of(fake_config, method="my_memories:elr", schedule="constant(0.0)", augment="normalize(0.5, 0.5)")
    config.data.placement = place
    programs, split, _, state = trained_for(config, 8)
    pixels = np.stack(split.read(np.arange(64))["image"]) / np.float32(255)
    logits = programs.recipe.model.apply({"params": state.params, **state.model_state}, 2 * pixels - 1)
    expected = (1 - 0.7**2) * scipy.special.softmax(np.float64(logits), -1)
    np.testing.assert_allclose(state.model_state["memory"]["targets"], expected, rtol=1e-5)


@pytest.mark.parametrize(("values", "said"), [
    (lambda x: {"spread": jnp.mean(x)}, r"'spread' of the shape \[\]; return one number per example, \[16\]"),
    (lambda x: {"spread": jnp.mean(x, (1, 2))}, r"'spread' of the shape \[16, 1\]"),  # was summed over 16 x 16
    (lambda x: {"accuracy": x[:, 0, 0, 0]}, "'accuracy', a name of another result; rename it"),
    (lambda x: {"spread": x[:, 0, 0, 0]}, None),
])  # fmt: skip
def test_a_methods_evaluation_is_a_number_per_example_under_a_name_of_its_own(values, said):
    model = Classifier(Sowing(), CLASSES)
    method = Method(lambda *_: None, evaluate=lambda model, batch, fixed: values(batch["image"]))
    evaluate = step.make_eval_step(model, losses.softmax, scale, method=method)
    state = step.init_state(model, optax.sgd(1.0), SHAPE, 0)
    given = {**batch(), "mask": np.ones(16, bool)}
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        sums, _ = jax.eval_shape(evaluate, state.params, state.model_state, given)
        assert metrics.reported(sums, {})[-1] == "spread"
        assert sums["own/spread"].shape == ()


@pytest.mark.parametrize(("extra", "said"), [
    ({"again": np.zeros((32, 3))}, None),  # such as two views of each example
    ({"centers": np.zeros(10)}, r"accumulate=2 .* 'centers' has the shape \[10\]"),  # was cut to its even entries
    ({"nested": {"weight": np.float32(1)}}, r"'nested/weight' has the shape \[\]"),
])  # fmt: skip
def test_accumulation_splits_only_arrays_of_examples(extra, said):
    method = Method(softmax_loss, lambda key, batch, augment: {**batch, "image": scale(key, batch["image"]), **extra})
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        one_step(Sowing(), method, accumulate=2)
    one_step(Sowing(), method)


class Remembering(Classifier):
    def setup(self):
        super().setup()
        self.memory = self.variable("memory", "queue", jnp.zeros, (3,))


@pytest.mark.parametrize(("change", "said"), [
    (lambda x: x + 1, None),
    (lambda x: x.astype(jnp.bfloat16), r"memory/queue is bfloat16\[3\] instead of float32\[3\]"),
    (lambda x: jnp.concatenate([x, x]), r"memory/queue is float32\[6\] instead of float32\[3\]"),
    (lambda x: {}, r"memory/queue is nothing instead of float32\[3\]"),
])  # fmt: skip
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_state_of_a_method_keeps_its_shapes_and_dtypes(change, said, accumulate):
    def loss(model, batch, fixed):
        model.memory.value = change(model.memory.value)
        return softmax_loss(model, batch, fixed)

    model, optimizer = Remembering(Sowing(), CLASSES), optax.sgd(1.0)
    train_step = step.make_train_step(model, Method(loss), optimizer, optax.constant_schedule(1.0), scale,
                                      accumulate=accumulate)  # fmt: skip
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        jax.eval_shape(train_step, step.init_state(model, optimizer, SHAPE, 0), batch())


def not_a_method(problem):
    return {"loss": 1}


def bare(problem):
    return Method(lambda model, batch, fixed: jnp.mean(model(batch["image"], train=True), -1))


def taken(problem):
    return Method(lambda *given: softmax_loss(*given).replace(metrics={"grad_norm": jnp.float32(1)}))


def missing(problem):
    return Method(lambda model, batch, fixed: Loss(batch["weight"]))


def test_a_missing_key_lists_those_of_the_batch(fake_config, tmp_path):
    with pytest.raises(KeyError) as error:
        train.main(config_of(fake_config, method=f"{__name__}:missing"), Workdir(tmp_path))
    assert error.value.__notes__[0] == "the batch has the keys 'epoch', 'id', 'image', 'label'"


def mean_loss(logits, labels):
    return jnp.mean(losses.softmax(logits, labels))  # with `mix` it was broadcast in silence


def wrong_ones(logits, labels):
    return (jnp.argmax(logits, -1) != labels).astype(jnp.int32)  # whose gradient is zero


kept: list[jax.Array] = []


def leaking(logits, labels):
    kept.append(jnp.mean(logits))
    return losses.softmax(logits, labels) + kept[0]


class AlwaysTraining(nn.Module):
    mode: bool | None = False

    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=self.mode)(x.reshape(len(x), -1))


@pytest.mark.parametrize(("key", "value", "said"), [
    ("model", f"{__name__}:AlwaysTraining(mode=None)", r"calls a layer without .* \(Parameter \"use_running_ave"),
    ("loss", f"{__name__}:mean_loss", r"mean_loss' returns float32\[\] for logits .*; return a float for each example"),
    ("loss", f"{__name__}:wrong_ones", r"wrong_ones' returns int32\[16\] for logits "),
    ("loss", f"{__name__}:leaking", "leaking' keeps an array of one trace for another"),
    ("model", f"{__name__}:AlwaysTraining", r"in evaluation too; set use_running_average=not train \(Cannot .*/BatchN"),
    ("method", f"{__name__}:not_a_method", "returns a dict; return imgclf_jax.methods.Method"),
    ("method", f"{__name__}:bare", "the method's loss returns a .*; return imgclf_jax.methods.Loss"),
    ("method", f"{__name__}:taken", "a metric is called 'grad_norm', which every step has, or"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(key, value, said, fake_config, tmp_path):
    with pytest.raises(UserError, match=said):
        train.main(config_of(fake_config, **{"mix": "mixup" * (key == "loss"), key: value}), Workdir(tmp_path))

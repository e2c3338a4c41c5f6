"""FixMatch and mean teacher: one pass for all images, the teacher over several steps, eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from imgclf_jax import losses, step
from imgclf_jax.augment import ops
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.methods import Problem
from imgclf_jax.methods.distill import distill
from imgclf_jax.methods.fixmatch import fixmatch, forward_together, pseudo_label_losses
from imgclf_jax.methods.mean_teacher import mean_teacher, ramp_up
from imgclf_jax.methods.simclr import simclr, supcon
from imgclf_jax.models.classifier import Classifier
from imgclf_jax.models.norms import BatchNorm

PROBLEM = Problem(
    classes=3, class_names=("a", "b", "c"), image_shape=(6, 6, 1), head_init=nn.initializers.glorot_uniform(),
    supervised=lambda logits, batch: losses.softmax(logits, batch["label"]), steps=lambda text: int(text.rstrip("%")),
    normalization="normalize(0.5)", task=losses.Task.CLASSES, build_augment=lambda text: ops.build(text, train=True),
)  # fmt: skip


class Net(nn.Module):
    """A small backbone with batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = BatchNorm(momentum=0.9, name="norm")(nn.Dense(7)(x.reshape(len(x), -1)), train)
        return nn.Dropout(0.2, deterministic=not train)(nn.relu(x))


def augment(key, images, *known):
    return images.astype(jnp.float32) / 255 + 0.3 * jax.random.normal(key, images.shape)


def batch(b=8, u=24):
    rng = np.random.default_rng(0)

    def stream(n):
        images = rng.integers(0, 256, (n, *PROBLEM.image_shape), np.uint8)
        labels = rng.integers(0, 3, n, np.int32)
        return {"image": images, "label": labels, "id": np.arange(n), "epoch": np.zeros(n, np.int32)}

    return {**stream(b), **({"unlabeled": stream(u)} if u else {})}


def run(method, given, devices=1, backbone=None, **kwargs):
    """(state before, state after, sums) of one step of plain SGD at learning rate 1."""
    make = method.model or (lambda backbone, problem: Classifier(backbone, problem.classes))
    model, optimizer = make(backbone or Net(), PROBLEM), optax.sgd(1.0)
    train_step = step.make_train_step(model, method, optimizer, optax.constant_schedule(1.0), augment, **kwargs)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    state = sharding.put_replicated(step.init_state(model, optimizer, PROBLEM.image_shape, 0), mesh)
    return state, *jax.jit(train_step)(state, sharding.put_batch(given, mesh))


def test_infinite_logits_below_the_threshold_add_nothing_and_nan_is_told():
    weak = jnp.array([[0.0, 0.1, 0.0], [9.0, 0.0, 0.0], [jnp.nan, 0.0, 0.0]])
    strong = jnp.array([[0.0, -jnp.inf, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    values, mask = pseudo_label_losses(weak, strong, 0.95)
    np.testing.assert_allclose(values, [0.0, np.log(3), np.nan], rtol=1e-6)
    np.testing.assert_array_equal(mask, [0, 1, 0])


def test_one_pass_has_the_statistics_of_all_batches():
    batches = [jax.random.normal(jax.random.key(n), (n, 2, 2, 1)) for n in (4, 12, 6)]
    means = forward_together(lambda x: jnp.broadcast_to(x.mean(), (len(x), 1)), batches)
    np.testing.assert_allclose(means[1], np.concatenate([x.ravel() for x in batches]).mean(), rtol=1e-4)


def test_the_weight_ramps_up_as_in_the_paper():
    wanted = [np.exp(-5 * (1 - min(step, 8) / 8) ** 2) for step in range(10)]
    np.testing.assert_allclose([ramp_up(jnp.int32(step), 8) for step in range(10)], wanted, rtol=1e-6)


def test_the_teacher_has_running_statistics_of_its_own():
    state = run(mean_teacher(PROBLEM), batch(u=0))[1].model_state
    means = [x["batch_stats"]["backbone"]["norm"]["mean"] for x in (state["teacher"]["average"], state)]
    assert np.abs(means[0] - means[1]).max() > 1e-4


@pytest.mark.thorough
@pytest.mark.parametrize("method", [
    fixmatch(PROBLEM, threshold=0.5, strong="cutout(2)"), mean_teacher(PROBLEM, ramp="2"), simclr(PROBLEM),
    supcon(PROBLEM),
], ids=["fixmatch", "mean_teacher", "simclr", "supcon"])  # fmt: skip
def test_eight_devices_train_as_one(method):
    """Also where each example of the global batch is compared with all others."""
    (before, one, sums), (_, eight, of_eight) = (run(method, batch(), devices=n) for n in (1, 8))
    assert 0 < sums.get("mask_rate", 4) / 8 < 1
    assert np.isfinite(sums["grad_norm"])
    part = "head" if method.predicts else "projector"
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before.params[part], one.params[part])
    assert all(jax.tree.leaves(changed))
    np.testing.assert_allclose(sums["loss"], of_eight["loss"], rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves((state.params, state.model_state)) for state in (one, eight)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_distillation_needs_probabilities():
    with pytest.raises(UserError, match="distill needs a loss with probabilities"):
        distill(dataclasses.replace(PROBLEM, link=losses.Link(*[np.asarray] * 4)), "run")

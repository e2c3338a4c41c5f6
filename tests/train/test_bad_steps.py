"""Steps whose loss or gradient is not finite are skipped: they change nothing, and are in no average."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from imgclf_jax import datasets, programs
from imgclf_jax import step as steps
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sampling
from imgclf_jax.losses import softmax
from imgclf_jax.models.classifier import Classifier
from imgclf_jax.optim import optimizers, weight_averages
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train import command as train

TOTAL, BATCH, EXAMPLES = 24, 16, 64
POISON = ((3, 1), (9, 3))  # (example, epoch)


def step_of(example, epoch, seed=0):
    """The step that has an example in an epoch, of 0, 1, …"""
    steps = range(epoch * EXAMPLES // BATCH, (epoch + 1) * EXAMPLES // BATCH)
    return next(step for step in steps if example in sampling.example_ids(seed, step, BATCH, EXAMPLES))


BAD = sorted(step_of(*one) for one in POISON)


@pytest.fixture
def poisoned(fake_config):
    fake_config.total, fake_config.log_every, fake_config.eval_every = f"{TOTAL} steps", "5 steps", ""
    fake_config.model, fake_config.optimizer = "mlp(widths=(8,), dropout=0.1)", "adam"
    fake_config.augment = f"normalize|launched:poison({POISON})"
    return fake_config


def train_without(config, left_out):
    """The parameters of a run that omits the updates of these steps, from the train step alone."""
    config = config.copy_and_resolve_references()
    config.on_bad_step = "stop"
    images = datasets.open_train_images(config)
    of = programs.programs_for_images(config, images)
    state = of.init_state()
    for number, batch in of.batches(images, range(TOTAL)):
        if number in left_out:
            state = state.replace(step=state.step + 1)
        else:
            state, _ = of.train(state, of.zero_sums(), batch)
    return state.params


def test_a_bad_step_is_skipped(poisoned, tmp_path, one_device, caplog):
    """It changes nothing, is counted, and is in no average; the learning rate waits for it as the optimizer does."""
    config = poisoned
    config.on_bad_step, config.checkpoint.keep = "skip", 9
    config.schedule = "linear(1e-2, end=0.0)"
    assert train.main(config, Workdir(tmp_path / "a")) == 0
    assert json.loads((tmp_path / "a" / "result.json").read_text())["skipped"] == 2
    assert caplog.text.count("skipped 1 of the 5 steps since the last log line") == 2
    found = Checkpoints(tmp_path / "a" / "checkpoints", read_only=True).restore(TOTAL, optimizer=False)["state"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, dict(found["params"]), dict(train_without(config, BAD)))
    logged = [line for line in read_metrics(tmp_path / "a" / "metrics.jsonl") if "train/loss" in line]
    assert sum(line["train/skipped"] for line in logged) == 2
    assert np.isfinite([line["train/loss"] for line in logged]).all()
    last = logged[-1]  # steps 21 to 24, as updates 19 to 22 of 24
    assert last["train/learning_rate"] == pytest.approx(1e-2 * (1 - np.mean([18, 19, 20, 21]) / TOTAL), rel=1e-5)


@pytest.mark.thorough
def test_one_of_two_seeds_fails_in_its_only_step(poisoned, tmp_path, one_device):
    """It is named with the examples of its own stream, and leaves no result if the step is skipped."""
    first, second = (sampling.example_ids(seed, 0, BATCH, EXAMPLES) for seed in (0, 1))
    poisoned.num_seeds, poisoned.total = 2, "1 steps"
    poisoned.augment = f"normalize|launched:poison((({np.setdiff1d(second, first)[0]}, 0),))"
    with pytest.raises(UserError, match="not finite at step 0, "):
        train.main(poisoned, Workdir(tmp_path / "a"))
    found = json.loads((tmp_path / "a" / "nonfinite.json").read_text())
    assert (found["seed"], found["example_ids"]) == (1, second.tolist())
    poisoned.on_bad_step = "skip"
    with pytest.raises(UserError, match="all 1 steps were skipped"):
        train.main(poisoned, Workdir(tmp_path / "b"))
    assert not (tmp_path / "b" / "result.json").exists()


def root_loss(logits, labels):
    """A finite loss without a finite gradient: the root of 0."""
    return softmax(logits, labels) + jnp.sqrt(logits[:, 0] - logits[:, 0])


def make_skipping(loss, average=weight_averages.NONE):
    """(initial state, train step) of a run that skips steps, as those with a pixel of 255."""
    model, optimizer = Classifier(Flat(), 2), optax.sgd(0.1)
    step = steps.make_train_step(model, loss, optimizer, optax.constant_schedule(0.1), poisoned_where_255, average,
                                 skip_nonfinite=True)  # fmt: skip
    return steps.init_state(model, optimizer, (2, 2, 1), 0, average), jax.jit(step)


def test_a_step_whose_gradient_alone_is_not_finite_is_skipped():
    before, step = make_skipping(root_loss)
    state, sums = step(before, {"image": np.zeros((4, 2, 2, 1), np.uint8), "label": np.zeros(4, np.int32)})
    assert (int(state.step), int(state.skipped), int(sums["skipped"]), int(sums["steps"])) == (1, 1, 1, 0)
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)


@pytest.mark.parametrize(("decay", "text"), [(0.0, "sgd|lookahead(3, 0.5, power=2)"), (0.9, "sgd")])
def test_weight_averages_count_updates_and_not_skipped_steps(decay, text):
    """Lookahead synchronizes every k updates (Zhang et al. 2019): a skipped step was a lost synchronization."""
    start, step = make_skipping(softmax, weight_averages.build(decay, optimizers.split_lookahead(text)[1], 9))
    rng = np.random.default_rng(0)
    good = [{"image": rng.integers(0, 200, (4, 2, 2, 1), np.uint8), "label": rng.integers(0, 2, 4, np.int32)}
            for _ in range(7)]  # fmt: skip
    bad = {**good[0], "image": np.full_like(good[0]["image"], 255)}

    def train(batches):
        state = start
        for batch in batches:
            state, _ = step(state, batch)
        return state

    skipping, plain = train([*good[:2], bad, *good[2:6], bad, bad, good[6]]), train(good)
    assert int(skipping.skipped) == 3
    jax.tree.map(
        np.testing.assert_array_equal, (skipping.params, skipping.eval_variables), (plain.params, plain.eval_variables)
    )


def poisoned_where_255(key, images):
    return jnp.where(images == 255, jnp.nan, images.astype(jnp.float32) / 255)


class Flat(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(3)(images.reshape(len(images), -1))

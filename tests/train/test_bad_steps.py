"""Steps whose loss is not finite or spikes: skipped or rolled back, with the same bits however the run is resumed."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import thorough
from flax import linen as nn

import launch
from imgclf_jax import bad_steps, programs
from imgclf_jax import step as steps
from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources, stream
from imgclf_jax.losses import softmax
from imgclf_jax.models.classifier import Classifier
from imgclf_jax.optim import optimizers, weight_averages
from imgclf_jax.run import goodput, skipped
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train import loop as train

TOTAL, BATCH, EXAMPLES = 24, 16, 64
POISON = ((3, 1), (9, 3))  # (example, epoch)


def step_of(example, epoch, seed=0):
    """The step that has an example in an epoch, of 0, 1, …"""
    steps = range(epoch * EXAMPLES // BATCH, (epoch + 1) * EXAMPLES // BATCH)
    return next(step for step in steps if example in stream.example_ids(seed, step, BATCH, EXAMPLES))


BAD = sorted(step_of(*one) for one in POISON)


@pytest.fixture
def poisoned(fake_config):
    fake_config.total, fake_config.log_every, fake_config.eval_every = f"{TOTAL} steps", "5 steps", ""
    fake_config.model, fake_config.optimizer = "mlp(widths=(8,), dropout=0.1)", "adam"
    fake_config.augment = f"normalize|poisoned:poison({POISON})"
    return fake_config


def outcome(workdir):
    result = json.loads((workdir / "result.json").read_text())
    lines = [{k: v for k, v in line.items() if "second" not in k and "wait" not in k}
             for line in read_metrics(workdir / "metrics.jsonl")]  # fmt: skip
    return result["params_sha256"], lines, read_metrics(workdir / "skipped.jsonl")


def train_without(config, left_out):
    """The parameters of a run that omits the updates of these steps, from the train step alone."""
    config = config.copy_and_resolve_references()
    config.on_bad_step, config.spike = "stop", ""
    images = stream.open_train_images(config, sources.open_data(config))
    of = programs.programs_for_images(config, images)
    state, step = of.init()["state"], jax.jit(jax.extend.core.jaxpr_as_fun(of.train_step.jaxpr))
    for number in range(TOTAL):
        if number in left_out:
            state = state.replace(step=state.step + 1)
            continue
        ids = stream.positions(range(number, number + 1), BATCH, np.arange(BATCH))
        batch = images.read(images.ids(config.seed, ids), ids)
        batch |= {"id": images.ids(config.seed, ids).astype("int32"), "epoch": (ids // EXAMPLES).astype("int32")}
        leaves = step(*jax.tree.leaves((state, batch)))
        state, _ = jax.tree.unflatten(of.train_step.out_tree, leaves)
    return state.params


def last_parameters(workdir):
    return Checkpoints(workdir / "checkpoints", read_only=True).restore_any(TOTAL)["state"]["params"]


def assert_close(a, b):
    for (name, x), (_, y) in zip(tree.named_leaves(a), tree.named_leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6, err_msg=name)


def resumed(workdir, step, tmp_path, config):
    """The outcome of the run in `workdir`, resumed from its checkpoint of `step`, in a copy."""
    copy = tmp_path / f"from-{step}"
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("lock"))
    (copy / "result.json").unlink()
    for later in Checkpoints(copy / "checkpoints", read_only=True).steps():
        if later > step:
            shutil.rmtree(copy / "checkpoints" / str(later))
    assert train.main(config, Workdir(copy)) == 0
    return outcome(copy)


@pytest.mark.parametrize("bad", ["not finite", *thorough("spike")])
def test_a_bad_step_is_skipped(bad, poisoned, tmp_path, one_device):
    """It changes nothing, is recorded, and is in no average; the learning rate waits for it as the optimizer does."""
    config = poisoned
    config.on_bad_step, config.checkpoint.keep = "skip", 9
    config.schedule = "linear(1e-2, end=0.0)"
    if bad == "spike":
        config.augment, config.spike = f"normalize|poisoned:poison({POISON}, -1e4)", "6 sigma over 4"
    assert train.main(config, Workdir(tmp_path / "a")) == 0
    _, lines, skipped = outcome(tmp_path / "a")
    assert [(line["step"], line["seed"], line["reason"]) for line in skipped] == [(step, 0, bad) for step in BAD]
    assert [line["loss"] is None for line in skipped] == [bad == "not finite"] * 2
    assert_close(last_parameters(tmp_path / "a"), train_without(config, BAD))
    logged = [line for line in lines if "train/loss" in line]
    assert sum(line["train/skipped"] for line in logged) == 2
    assert np.isfinite([line["train/loss"] for line in logged]).all()
    last = logged[-1]  # steps 21 to 24, as updates 19 to 22 of 24
    assert last["train/learning_rate"] == pytest.approx(1e-2 * (1 - np.mean([18, 19, 20, 21]) / TOTAL), rel=1e-5)
    assert json.loads((tmp_path / "a" / "result.json").read_text())["skipped"] == 2


def root_loss(logits, labels):
    """A finite loss without a finite gradient: the root of 0."""
    return softmax(logits, labels) + jnp.sqrt(logits[:, 0] - logits[:, 0])


def test_a_gradient_that_is_not_finite_is_no_spike(tmp_path, caplog):
    model, optimizer, skip = Classifier(Flat(), 2), optax.sgd(0.1), bad_steps.Policy("skip")
    step = steps.make_train_step(
        model, root_loss, optimizer, optax.constant_schedule(0.1), poisoned_where_255, policy=skip
    )
    batch = {"image": np.zeros((4, 2, 2, 1), np.uint8), "label": np.zeros(4, np.int32)}
    guard = jax.jit(lambda: step(steps.init_state(model, optimizer, (2, 2, 1), 0, policy=skip), batch)[0].guard)()
    record = skipped.Skipped(tmp_path, 0, skip.init(), seed=0)
    assert record.note(guard, 1) is None
    record.close()
    assert skipped.read(tmp_path) == [{"step": 0, "seed": 0, "loss": None, "reason": "not finite"}]
    assert "step 0 skipped: its loss, gradient or parameters are not finite (seed 0)" in caplog.text


@pytest.mark.thorough
def test_a_run_that_skips_resumes_to_the_same_bits(poisoned, tmp_path, one_device):
    config = poisoned
    config.on_bad_step, config.checkpoint.keep = "skip", 9
    assert train.main(config, Workdir(tmp_path / "a")) == 0
    for step in (4, 16):
        assert resumed(tmp_path / "a", step, tmp_path, config) == outcome(tmp_path / "a")


@pytest.mark.thorough
def test_a_run_rolls_back(poisoned, tmp_path, one_device, caplog):
    """It leaves out the steps before the bad one, whatever checkpoints there are; and nothing nonfinite is recorded.

    Each attempt records its own time up to the step that it reached.
    """
    config = poisoned
    config.on_bad_step, config.checkpoint.keep = "rollback(steps=3)", 9
    assert train.main(config, Workdir(tmp_path / "a")) == 0
    _, lines, skipped = outcome(tmp_path / "a")
    expected = [(max(bad - 2, 0), bad + 1) for bad in BAD]
    assert [(line["step"], line["until"]) for line in skipped] == expected
    left_out = {step for first, until in expected for step in range(first, until)}
    assert_close(last_parameters(tmp_path / "a"), train_without(config, left_out))
    assert np.isfinite([value for line in lines for value in line.values()]).all()
    assert json.loads((tmp_path / "a" / "result.json").read_text())["skipped"] == len(left_out)
    attempts = goodput.last_of_each(read_metrics(tmp_path / "a" / goodput.NAME))
    assert [one["first"] for one in attempts] == [0, *(max(s for s in range(0, first + 1, 4)) for first, _ in expected)]
    assert all(one["step"] > bad for one, bad in zip(attempts, [*BAD, TOTAL - 1], strict=True))
    assert [one["seconds"]["import"] == 0.0 for one in attempts] == [False, True, True]
    assert all(sum(one["seconds"].values()) == pytest.approx(one["at"] - one["began"], abs=0.01) for one in attempts)
    assert all(before["at"] <= after["began"] for before, after in itertools.pairwise(attempts))


@pytest.mark.thorough
def test_a_run_that_rolls_back_ends_with_the_same_bits_whatever_checkpoints_there_are(poisoned, tmp_path, one_device):
    config = poisoned
    config.on_bad_step, config.checkpoint.keep = "rollback(steps=3)", 9
    assert train.main(config, Workdir(tmp_path / "a")) == 0
    assert resumed(tmp_path / "a", 4, tmp_path, config) == outcome(tmp_path / "a")
    config.checkpoint_every = ""  # from the start each time
    assert train.main(config, Workdir(tmp_path / "c")) == 0
    assert outcome(tmp_path / "c") == outcome(tmp_path / "a")


@pytest.mark.thorough
def test_killed_between_the_checkpoints_and_the_record_of_a_rollback(poisoned, tmp_path, one_device, monkeypatch):
    """The resumed run meets the bad step again, and plans the same."""
    config = poisoned
    config.on_bad_step = "rollback(steps=3)"
    assert train.main(config, Workdir(tmp_path / "a")) == 0

    def kill(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("imgclf_jax.run.skipped.Skipped.leave_out", kill)
        with pytest.raises(RuntimeError, match="killed"):
            train.main(config, Workdir(tmp_path / "b"))
    assert train.main(config, Workdir(tmp_path / "b")) == 0
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")


def test_a_spike_stops_a_run_unless_told_otherwise(poisoned, tmp_path, one_device):
    poisoned.augment, poisoned.spike = f"normalize|poisoned:poison({POISON}, -1e4)", "6 sigma over 4"
    with pytest.raises(UserError, match=rf"the loss spikes \(spike=.*\) at step {BAD[0]}, .*on_bad_step="):
        train.main(poisoned, Workdir(tmp_path))


@pytest.mark.thorough
def test_bad_steps_in_a_row_are_left_out_one_after_the_other(poisoned, tmp_path, one_device):
    """Each rollback begins where the one before it ends."""
    poisoned.on_bad_step = "rollback(steps=2)"
    in_a_row = [next(i for i in stream.example_ids(0, step, BATCH, EXAMPLES)) for step in (5, 6, 7)]
    poisoned.augment = f"normalize|poisoned:poison({tuple((int(i), 1) for i in in_a_row)})"
    assert train.main(poisoned, Workdir(tmp_path)) == 0
    skipped = read_metrics(tmp_path / "skipped.jsonl")
    assert [(line["step"], line["until"]) for line in skipped] == [(4, 6), (6, 7), (7, 8)]


@pytest.mark.thorough
@pytest.mark.parametrize("check", ["", "100 steps"])
def test_a_run_that_skips_everything_ends(check, poisoned, tmp_path, one_device):
    """With `check_every` the steps are computed again before the data are blamed."""
    poisoned.check_every = check
    poisoned.on_bad_step, poisoned.total, poisoned.log_every, poisoned.checkpoint_every = "skip", "90 steps", "", ""
    every = tuple((0, epoch) for epoch in range(90))
    poisoned.augment = f"normalize|poisoned:poison({every})"
    poisoned.batch_size = EXAMPLES  # so every step has the example
    with pytest.raises(
        UserError,
        match=r"64 steps up to step 89 were .*: "
        + ("computed twice with the same result, .* blame; " if check else "")
        + "the run has diverged",
    ):
        train.main(poisoned, Workdir(tmp_path))


@pytest.mark.parametrize(("decay", "text"), [(0.0, "sgd|lookahead(3, 0.5, power=2)"), (0.9, "sgd")])
def test_weight_averages_count_updates_and_not_skipped_steps(decay, text):
    """Lookahead synchronizes every k updates (Zhang et al. 2019): a skipped step was a lost synchronization."""
    model, optimizer = Classifier(Flat(), 2), optax.sgd(0.1)
    average = weight_averages.build(decay, optimizers.split_lookahead(text)[1], lambda text: 0, 9)
    skip = bad_steps.Policy("skip")
    one = jax.jit(steps.make_train_step(
        model, softmax, optimizer, optax.constant_schedule(0.1), poisoned_where_255, average, policy=skip
    ))  # fmt: skip
    rng = np.random.default_rng(0)
    good = [{"image": rng.integers(0, 200, (4, 2, 2, 1), np.uint8), "label": rng.integers(0, 2, 4, np.int32)}
            for _ in range(7)]  # fmt: skip
    bad = {**good[0], "image": np.full_like(good[0]["image"], 255)}

    def train(batches):
        state = steps.init_state(model, optimizer, (2, 2, 1), 0, average, policy=skip)
        for batch in batches:
            state, _ = one(state, batch)
        return state

    skipping, plain = train([*good[:2], bad, *good[2:6], bad, bad, good[6]]), train(good)
    assert int(skipping.guard.skipped) == 3
    jax.tree.map(np.testing.assert_array_equal, (skipping.params, skipping.ema), (plain.params, plain.ema))


def poisoned_where_255(key, images):
    return jnp.where(images == 255, jnp.nan, images.astype(jnp.float32) / 255)


class Flat(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(3)(images.reshape(len(images), -1))


@pytest.mark.thorough
def test_the_moving_average_is_that_of_its_definition():
    """The first losses have equal weights, later ones exponential ones, and bad steps none."""
    policy, rng = bad_steps.build("skip", "4 sigma over 8"), np.random.default_rng(0)
    losses = rng.normal(3.0, 0.2, 40).astype(np.float32)
    losses[[20, 33]] = 9.0, np.nan
    guard = policy.init()
    for step, loss in enumerate(losses):
        bad = policy.is_spike(guard, loss) | ~np.isfinite(loss)
        assert bool(bad) == (step in (20, 33))
        guard = policy.updated(guard, jax.numpy.int32(step), jax.numpy.float32(loss), bad)
    good = np.delete(losses, [20, 33]).astype(np.float64)
    weights = np.ones(1)
    for n in range(2, len(good) + 1):
        weights = np.append(weights * (1 - 1 / min(n, 8)), 1 / min(n, 8))
    mean = weights @ good
    assert float(guard.mean) == pytest.approx(mean, rel=1e-5)
    assert float(guard.variance) == pytest.approx(weights @ (good - mean) ** 2, rel=1e-3)
    assert (int(guard.good), int(guard.skipped), list(guard.steps[:3])) == (38, 2, [20, 33, -1])


@pytest.mark.parametrize(
    ("action", "spike", "sentence"),
    [
        ("skips", "", r"on_bad_step='skips': allowed is one of stop, skip and rollback"),
        ("skip|stop", "", "allowed is one of"),
        ("rollback(steps=0)", "", "steps must be a whole number of 1 or more"),
        ("rollback(stepz=3)", "", "steps"),
        ("skip", "6 sigmas", "write '6 sigma over 128'"),
        ("skip", "0 sigma over 9", "write '6 sigma over 128'"),
    ],
)
def test_what_no_policy_can_be(action, spike, sentence):
    with pytest.raises(UserError, match=sentence):
        bad_steps.build(action, spike)


def test_the_default_has_no_guard(tmp_path):
    assert launch.main(["config", "--config.on_bad_step=skip"]) == 0
    assert not bad_steps.build("stop", "").guarded
    assert bad_steps.build("stop", "6 sigma over 128").guarded


@pytest.mark.parametrize("line", [{"until": "9"}, {"until": None}, {"until": 9, "bad_step": [8]}])
def test_a_line_of_skipped_steps_that_is_damaged(tmp_path, line):
    """One sentence: without the line, the run would compute other steps."""
    (tmp_path / "skipped.jsonl").write_text(json.dumps({"step": 3, **line}) + "\n")
    for function in (skipped.read, skipped.read_left_out, lambda folder: skipped.forget_left_out(folder, 4)):
        with pytest.raises(UserError, match=r"skipped.jsonl is damaged: the step in a line is not a whole number"):
            function(tmp_path)

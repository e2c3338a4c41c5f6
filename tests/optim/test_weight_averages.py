"""Weight averages against NumPy: the moving average, Lookahead as published, and airbench94's variant of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import flags
from tolerance import rounding

import launch
from imgclf_jax.core import tree
from imgclf_jax.data import sources, stream
from imgclf_jax.optim import optimizers, weight_averages
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train.evaluation import evaluate_all
from imgclf_jax.trained import restore

STEPS = 40
GRADS = np.random.default_rng(0).normal(size=(STEPS, 5)).astype(np.float32)
START = np.linspace(-1, 1, 5, dtype=np.float32)


def train(average, optimizer=None):
    """The weights and average of every step, from START along GRADS; the batch statistic is the sum of the weights."""
    optimizer = optimizer or optax.sgd(0.1)

    @jax.jit
    def step(i, params, opt_state, averaged, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        state = {"mean": jnp.sum(params), "count": i + 1}
        (params, state), averaged = average.update(averaged, (params, state), i)
        return params, opt_state, averaged, state

    params = jnp.asarray(START)
    opt_state = optimizer.init(params)
    averaged = average.init((params, {"mean": jnp.sum(params), "count": jnp.int32(0)}))
    out = []
    for i, grads in enumerate(GRADS):
        params, opt_state, averaged, state = step(jnp.int32(i), params, opt_state, averaged, grads)
        out.append(jax.device_get((params, averaged, state)))
    return out


def build(text, decay=0.0):
    call = optimizers.split_lookahead(text)[1]
    return weight_averages.build(decay, call, STEPS)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_ema_is_its_definition(decay):
    """With d = min(decay, (1 + t) / (10 + t)) after t updates; the weights themselves do not change."""
    params, average, total = START.astype(np.float64), START.astype(np.float64), START.sum(dtype=np.float64)
    for t, (ours, (averaged, state), _) in enumerate(train(build("sgd", decay))):
        d = min(decay, (1 + t) / (10 + t))
        params = params - 0.1 * GRADS[t]
        average, total = d * average + (1 - d) * params, d * total + (1 - d) * params.sum()
        np.testing.assert_allclose(ours, params, rtol=0, atol=1e-5)
        np.testing.assert_allclose(averaged, average, rtol=0, atol=1e-5)
        np.testing.assert_allclose(state["mean"], total, rtol=0, atol=1e-5)
        assert state["count"] == t + 1  # of integers the last


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (6, 0.8), (1, 0.3), (5, 1.0)])
def test_lookahead_is_optaxs(k, alpha):
    """Zhang et al. 2019, by optax's own lookahead; momentum is kept across the loop."""
    inner = optax.sgd(0.1, momentum=0.9)
    ours = train(build(f"sgd|lookahead({k}, {alpha})"), inner)
    theirs = optax.lookahead(inner, k, alpha)
    params = optax.LookaheadParams.init_synced(jnp.asarray(START))
    state = theirs.init(params)
    for grads, (fast, (slow, _), _) in zip(GRADS, ours, strict=True):
        updates, state = optimizers.promoting(theirs.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(fast, params.fast, rtol=0, atol=2e-5)
        np.testing.assert_allclose(slow, params.slow, rtol=0, atol=2e-5)


def test_lookahead_with_a_schedule_is_airbench94s():
    """As `legacy/airbench94.py` has it, lines 262-272, 392-393 and 428-436: from the first step on, and at the end the
    average."""
    ours = train(build("sgd|lookahead(5, 0.226219, power=3)"))
    params = START.astype(np.float64)
    average = (params, params.sum())
    for n, grads in enumerate(GRADS, 1):
        params = params - 0.1 * grads
        total = params.sum()
        for decay in [0.95**5 * (n / STEPS) ** 3] * (n % 5 == 0) + [1.0] * (n == STEPS):
            average = tuple(a + (1 - decay) * (x - a) for a, x in zip(average, (params, total), strict=True))
            params, total = average
        own, (averaged, state), own_state = ours[n - 1]
        np.testing.assert_allclose(averaged if n == STEPS else own, params, rtol=0, atol=1e-5)
        np.testing.assert_allclose(averaged, average[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose((state if n == STEPS else own_state)["mean"], total, rtol=0, atol=1e-5)
        np.testing.assert_allclose(state["mean"], average[1], rtol=0, atol=1e-5)


FLAGS = flags("augment=", "log_every=", "eval_every=", "total=22 steps", "schedule=constant(1e-2)",
              "checkpoint.best=test/loss")  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("flag", ["--config.ema=0.9", "--config.optimizer=sgd(momentum=0.9)|lookahead(5, 0.5)",
                                  "--config.optimizer=schedule_free_adamw(b1=0.5)"])  # fmt: skip
def test_evaluation_and_prediction_use_the_average(tmp_path, flag):
    """The result, the checkpoint read back, and `predict`; `params_sha256` is that of the weights."""
    assert launch.main([f"--workdir={tmp_path}", *FLAGS, flag]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    workdir = Workdir(tmp_path)
    programs, state, _ = restore(workdir.load_config(), workdir, "best")
    assert result["params_sha256"] == tree.sha256(jax.device_get(state.params)) != tree.sha256(state.eval_variables[0])
    source = sources.open_splits(programs.recipe.config.data.source)["test"]
    examples = source.read(np.arange(64))
    images = examples["image"].astype(np.float32) / 255
    logits = jax.jit(programs.recipe.model.apply)({"params": state.eval_variables[0]}, images)
    loss = float(jnp.mean(programs.recipe.loss(logits, examples["label"])))
    close = rounding(12 * 12 + 16 + 4 + 4) * float(jnp.abs(logits).max())  # two dense layers and the softmax
    np.testing.assert_allclose(result["test"]["loss"], loss, rtol=0, atol=2 * close)  # its slope is 2 at most
    images = {"test": stream.Images(source, "decode(1)")}
    assert evaluate_all(programs, state, images)["test"] == result["test"]
    plain = evaluate_all(programs, state.replace(eval_variables=None), images)
    assert plain["test"]["loss"] != result["test"]["loss"]
    probabilities = programs.inference("predict")(*state.evaluated, examples["image"])
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), rtol=0, atol=close)
    if "schedule_free" in flag:
        saved = Checkpoints(workdir.checkpoints, read_only=True).restore(22, programs.shape)["state"]
        x = optax.contrib.schedule_free_eval_params(saved.opt_state, saved.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), saved.eval_variables[0], x)

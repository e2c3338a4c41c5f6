"""Optimizers and schedules by their definitions and by optax; every optimizer trains and resumes exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import programs, thorough
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from optax import contrib
from tolerance import rounding

from imgclf_jax import config, recipe, step
from imgclf_jax.config import default_config
from imgclf_jax.core import sharding, tree
from imgclf_jax.data import sources, stream
from imgclf_jax.optim import optimizers, schedules
from imgclf_jax.optim.optimizers import promoting
from imgclf_jax.optim.rules import Rules
from imgclf_jax.run.checkpoint import Checkpoints

RATE = 0.05


def by_optax(text, params, grads, clip=0.0, **ruled):
    """The parameters after the gradients, in float32, under jit."""
    optimizer = optimizers.build(text, optax.constant_schedule(RATE), clip, Rules(**ruled))
    update = jax.jit(optimizer.update)
    ours = jax.tree.map(np.float32, params)
    state, apply = jax.jit(optimizer.init)(ours), jax.jit(optax.apply_updates)
    for g in grads:
        updates, state = update(jax.tree.map(np.float32, g), state, ours)
        ours = apply(ours, updates)
    return dict(tree.named_leaves(ours))


def draw(shapes, count=4):
    rng = np.random.default_rng(0)
    return [{k: rng.normal(size=s) for k, s in shapes.items()} for _ in range(count)]


def newton_schulz(x, steps=5):
    """Jordan et al. 2024: X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X from X / |X|, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def test_muon_is_its_definition():
    """On matrices, on flattened convolution kernels, and Adam on the rest, four steps in float64.

    The update is the orthogonalized Nesterov momentum times sqrt(max(1, columns / rows)), its bias corrected as in
    Dozat 2016, plus the decoupled weight decay.
    """
    shapes = {"backbone/dense/kernel": (6, 4), "backbone/wide/kernel": (3, 8), "backbone/conv/kernel": (3, 3, 2, 5),
              "backbone/dense/bias": (4,), "backbone/positions": (5, 4), "head/kernel": (4, 3)}  # fmt: skip
    params, *grads = draw(shapes)
    nested, *steps = (unflatten_dict(x, sep="/") for x in (params, *grads))
    out = by_optax("muon(beta=0.9, weight_decay=0.1)", nested, steps)
    for name, p in params.items():
        m = v = 0
        for n, g in enumerate(g[name] for g in grads):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            ahead = 0.9 * m / (1 - 0.9 ** (n + 2)) + 0.1 * g / (1 - 0.9 ** (n + 1))
            if name.startswith("backbone/") and name.endswith("kernel"):
                rows, columns = int(np.prod(g.shape[:-1])), g.shape[-1]
                update = newton_schulz(ahead.reshape(rows, columns)) * np.sqrt(max(1, columns / rows))
                p = p - RATE * (update.reshape(p.shape) + 0.1 * p)
            else:
                p = p - RATE * ahead / (np.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8)
        np.testing.assert_allclose(out[name], p, rtol=0, atol=2e-5, err_msg=name)


def test_muon_sgd_rescales_kernels():
    """As airbench94_muon: v ← μ v + g, and p ← sqrt(f) p / |p| - η orthogonalized(g + μ v)."""
    params, *grads = draw({"kernel": (3, 3, 2, 5)})
    p, v = params["kernel"], 0.0
    for g in (g["kernel"] for g in grads):
        v = 0.6 * v + g
        update = newton_schulz((g + 0.6 * v).reshape(18, 5), 3).reshape(p.shape)
        p = p * np.sqrt(5) / np.linalg.norm(p) - RATE * update
    np.testing.assert_allclose(by_optax("muon_sgd", params, grads)["kernel"], p, rtol=0, atol=2e-5)


@pytest.mark.parametrize("text", [
    "add_decayed_weights(0.1)|sgd(momentum=0.9, nesterov=True)", "add_decayed_weights(0.1)|sgd(momentum=0.9)",
    "muon_sgd(weight_decay=0.1, momentum=0.9)", "adamw(weight_decay=0.1)",
])  # fmt: skip
def test_weight_decay_is_pytorchs_times_its_rule(text):
    """torch.optim.SGD: g ← g + λ p, v ← μ v + g, and p ← p - η v or, with nesterov, p ← p - η (g + μ v); and AdamW.

    A parameter without a rule has the factor 1, of the decay and of the learning rate.
    """
    params, *grads = draw({"a": (3, 2), "b": (4,), "c": (2,)})
    out = by_optax(text, params, grads, decay={"a": 0.0, "b": 0.25}, lr={"c": 0.5})
    for (name, p), factor in zip(params.items(), (0.0, 0.25, 1.0), strict=True):
        decay, m, v = 0.1 * factor, 0.0, 0.0
        for n, g in enumerate(g[name] for g in grads):
            if text.startswith("adamw"):
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                update = m / (1 - 0.9 ** (n + 1)) / (np.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8) + decay * p
            else:
                m = 0.9 * m + g + decay * p
                update = m if text.endswith("|sgd(momentum=0.9)") else g + decay * p + 0.9 * m
            p = p - RATE * (0.5 if name == "c" else 1) * update
        # Adam divides by the root of 1 - b2**n, whose relative error is 1000 times the rounding of b2 = 0.999.
        np.testing.assert_allclose(out[name], p, rtol=0, atol=3 * rounding(2 * 12) + RATE * rounding(3) * 500)


@pytest.mark.parametrize("clip", [1.0, 2.5, 100.0])
def test_clip_bounds_the_norm_over_all_parameters_together(clip):
    """A longer gradient is scaled to the norm, a shorter one unchanged."""
    params, *grads = draw({"a": (2, 2), "b": (2,)}, 3)
    norms = [np.sqrt(sum((x**2).sum() for x in g.values())) for g in grads]
    assert 1 < min(norms) < 2.5 < max(norms) < 100  # so that 2.5 clips one of them alone
    out = by_optax("sgd", params, grads, clip)
    for name, p in params.items():
        wanted = p - RATE * sum(g[name] * min(1, clip / norm) for g, norm in zip(grads, norms, strict=True))
        np.testing.assert_allclose(out[name], wanted, rtol=0, atol=3 * rounding(20))


class Net(nn.Module):
    """A convolution, a normalization with statistics, and dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, momentum=0.9)(nn.Conv(8, (3, 3), (2, 2))(x))
        x = nn.relu(x).reshape(x.shape[0], -1)
        return nn.Dropout(0.1, deterministic=not train)(nn.relu(nn.Dense(16)(x)))


WAYS = {
    "sgd(momentum=0.9, nesterov=True)": {},
    "adamw(weight_decay=1e-2)": {"schedule": "constant(1e-2)"},
    "lamb(weight_decay=1e-2)": {"schedule": "constant(1e-2)"},
    "lion(weight_decay=1e-2)": {"schedule": "constant(1e-3)"},
    "muon(weight_decay=1e-2)": {"schedule": "constant(2e-2)", "rules.lr": ".*bias=0.1"},
    "muon_sgd(weight_decay=1e-2)": {"schedule": "constant(2e-2)", "rules.decay": "head/.*=0.5"},
    "add_decayed_weights(5e-4)|sgd(momentum=0.9)|lookahead(4, 0.5)": {"rules.decay": ".*(bias|scale)=0"},
    "adam": {"schedule": "constant(1e-2)", "ema": 0.9, "accumulate": 2},
    "schedule_free_adamw(weight_decay=1e-2)": {"schedule": "constant(1e-2)"},
    "optax.contrib:prodigy": {"schedule": "constant(1.0)", "accumulate": 2},
    "adamw": {"schedule": "constant(1e-2)", "rules.freeze": "backbone/Conv_0/.*", "rules.layer_decay": 0.75},
}


@pytest.mark.thorough
@pytest.mark.parametrize("text", WAYS)
def test_it_trains_and_resumes_bit_for_bit(text, tmp_path):
    """In the compiled step on eight devices: the loss falls, and a state saved halfway leads to the same end."""
    of = programs(**{"schedule": "constant(0.1)", "optimizer": text, "total": "40 steps", "model": f"{__name__}:Net",
                     **WAYS[text]})  # fmt: skip
    images = stream.Images(sources.open_splits("fake(64, (12, 12, 1), 4)")["train"], "decode(1)")
    batches = [batch for _, batch in stream.batches(images, stream.StreamSpec(0, 16), range(40))]

    def go(run, first, last):
        """Trains on these steps; returns only their sums."""
        state, sums = sharding.put_replicated(run["state"], of.mesh), of.zero_sums()
        for batch in batches[first:last]:
            state, sums = of.train(state, sums, sharding.put_batch(batch, of.mesh))
        return {"state": state, "sums": sums}

    early = jax.device_get(go({"state": jax.device_get(of.init_state())}, 0, 10))
    half = jax.device_get(go(early, 10, 21))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(21, sharding.put_replicated(half, of.mesh))
    checkpoints.wait()
    found = checkpoints.restore(21, of.shape)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, found, half)
    end, resumed = go(half, 21, 40), go(found, 21, 40)
    jax.tree.map(np.testing.assert_array_equal, resumed, jax.device_get(end))
    assert float(end["sums"]["loss"]) / int(end["sums"]["examples"]) < 0.7 * float(early["sums"]["loss"]) / 160


STEPS = 20
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (STEPS, 32, 6, 6, 1), np.uint8), RNG.integers(0, 3, (STEPS, 32), np.int32)
SCHEDULE = "cosine(0.05, warmup='20%')"
SCHEDULED = schedules.build(SCHEDULE, lambda duration: {"20%": 4, "": 0}[duration], STEPS)

# By spec, optax's own optimizer, with the schedule where optax takes one.
BY_HAND = {
    "schedule_free_sgd(b1=0.8, weight_decay=1e-2)": lambda: contrib.schedule_free_sgd(SCHEDULED, None, 0.8, 1e-2),
    "schedule_free_adamw(weight_decay=1e-2)": lambda: contrib.schedule_free_adamw(SCHEDULED, weight_decay=1e-2),
    "optax.contrib:momo(weight_decay=1e-3, adapt_lower_bound=True)": lambda: contrib.momo(
        SCHEDULED, 0.9, 0.0, 1e-3, True
    ),
    "optax.contrib:momo_adam": lambda: contrib.momo_adam(SCHEDULED),
    "optax:lbfgs(memory_size=3, linesearch=None)": lambda: optax.lbfgs(SCHEDULED, 3, linesearch=None),
}


def parts(text, schedule=SCHEDULE, **more):
    config = default_config()
    keys = {"optimizer": text, "schedule": schedule, "clip": 0.5, "model": "mlp(widths=(8,))", "augment": ""}
    config.update_from_flattened_dict({**keys, "total": f"{STEPS} steps", "batch_size": 32, **more})
    return recipe.for_arrays(config, IMAGES[0], LABELS[0])


def train(found):
    """The state before the first step and after each step."""
    state = step.init_state(found.model, found.optimizer, found.data.image_shape, 5, found.average)
    augment = found.augment(train=True)
    pure = step.make_train_step(found.model, found.method, found.optimizer, found.schedule, augment, found.average)
    train_step = jax.jit(pure)
    states = [state]
    for images, labels in zip(IMAGES, LABELS, strict=True):
        states.append(train_step(states[-1], {"image": images, "label": labels})[0])
    return states


def by_hand(found, make, params):
    def loss(params, images, labels):
        logits = found.model.apply({"params": params}, images.astype(jnp.float32) / 255)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    optimizer = optax.chain(optax.clip_by_global_norm(0.5), make())

    @jax.jit
    def update(params, opt_state, images, labels):
        with jax.numpy_dtype_promotion("standard"):
            value, grads = jax.value_and_grad(loss)(params, images, labels)
            updates, opt_state = optimizer.update(grads, opt_state, params, value=value)
            return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for images, labels in zip(IMAGES, LABELS, strict=True):
        params, opt_state = update(params, opt_state, images, labels)
    return params, opt_state


def close(ours, theirs, start):
    """Up to rounding, since XLA fuses the two programs differently."""
    moved = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (theirs, start)), strict=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * moved), ours, theirs)


QUICK = ("schedule_free_adamw(weight_decay=1e-2)",)


@pytest.mark.parametrize("text", [*QUICK, *thorough(*(x for x in BY_HAND if x not in QUICK))])
def test_it_is_optax_by_hand(text):
    """Twenty steps: the parameters, the evaluated parameters, and a state whose dtypes do not change."""
    found = parts(text)
    states = train(found)
    params, opt_state = by_hand(found, BY_HAND[text], states[0].params)
    close(states[-1].params, params, states[0].params)
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), s) for s in states]
    assert kinds[0] == kinds[-1]
    if text.startswith("schedule_free"):
        evaluated = contrib.schedule_free_eval_params(opt_state[1], params)
        close(states[-1].evaluated[0], evaluated, states[0].params)
        gap = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (params, evaluated)), strict=True))
        assert gap > 1e-4
    else:
        assert states[-1].eval_variables is None


TOTAL = 100  # steps, of 10 examples each; an epoch is 20 steps
N = np.arange(TOTAL + 5)  # and a few steps after the last


def steps(text):
    return config.steps(text, "schedule", 200, 10, TOTAL)


def half_cosine(first, last, t):
    """From `first` at t = 0 to `last` at t = 1 and after."""
    return last + (first - last) * 0.5 * (1 + np.cos(np.pi * np.clip(t, 0, 1)))


def line(first, last, t):
    return first + (last - first) * np.clip(t, 0, 1)


DEFINITIONS = {  # spec → (steps of linear warmup, the rate at each step after it)
    "constant(0.3)": (0, np.full(105, 0.3)),
    "constant(0.3, warmup='10%')": (10, np.full(105, 0.3)),
    "constant(0.3, warmup='1 steps')": (1, np.full(105, 0.3)),
    "constant(0.3, warmup='100%')": (100, np.full(105, 0.3)),
    "cosine(0.3)": (0, half_cosine(0.3, 0, N / 100)),
    "cosine(0.3, warmup='1 epochs', end=0.03)": (20, half_cosine(0.3, 0.03, (N - 20) / 80)),
    "cosine(0, warmup='10 steps')": (10, np.zeros(105)),
    "linear(0.3)": (0, line(0.3, 0, N / 100)),
    "linear(0.3, warmup='100 examples', end=0.1)": (10, line(0.3, 0.1, (N - 10) / 90)),
    "one_cycle(0.3)": (0, np.where(N < 30, half_cosine(0.012, 0.3, N / 30), half_cosine(0.3, 3e-5, (N - 30) / 70))),
    "one_cycle(0.3, warmup='50%', start=0, end=0.1)": (
        0,
        np.where(N < 50, half_cosine(0, 0.3, N / 50), half_cosine(0.3, 0.03, (N - 50) / 50)),
    ),
    "triangle(0.3, warmup='25%', start=0.2, end=0.07)": (
        0,
        np.where(N < 25, 0.3 * (0.2 + 0.8 * N / 25), 0.3 * (1 - 0.93 * np.minimum(1, (N - 25) / 75))),
    ),
    "triangle(0.3, warmup='')": (0, 0.3 * np.maximum(0, 1 - N / 100)),
    "one_cycle(0.3, warmup='', end=0)": (0, half_cosine(0.3, 0, N / 100)),
    "step(0.3)": (0, np.select([N < 50, N < 75], [0.3, 0.03], 0.003)),
    "step(0.3, at=('1 epochs', '90 steps'), factor=0.5, warmup='5%')": (
        5,
        np.select([N < 20, N < 90], [0.3, 0.15], 0.075),
    ),
    "step(0.3, at=('50%', '50 steps'), factor=0.5)": (0, np.where(N < 50, 0.3, 0.075)),  # twice at one step
}


@pytest.mark.parametrize("text", DEFINITIONS)
def test_a_schedule_is_its_definition_at_every_step(text):
    """Warmup is (n + 1) / warmup of the peak, which the first step after it has too; the last value persists."""
    warmup, expected = DEFINITIONS[text]
    expected = np.where(warmup > N, expected[warmup] * (N + 1) / max(1, warmup), expected)
    out = jax.jit(jax.vmap(promoting(schedules.build(text, steps, TOTAL))))(jnp.asarray(N))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=0.3 * rounding(20))  # of terms up to the peak, 0.3

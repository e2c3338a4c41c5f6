"""Schedules against their definitions; optimizers against updates written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerance import rounding

from imgclf_jax import config
from imgclf_jax.core.errors import UserError
from imgclf_jax.optim import optimizers, schedules
from imgclf_jax.optim.optimizers import promoting

TOTAL = 100  # steps, of 10 examples each; an epoch is 20 steps


def steps(text, total=TOTAL):
    return config.steps(text, "schedule", 200, 10, total)


def rates(text, total=TOTAL, beyond=5):
    """The rate at each step, and a few after the last."""
    schedule = schedules.build(text, functools.partial(steps, total=total), total)
    return np.array(jax.jit(jax.vmap(promoting(schedule)))(jnp.arange(total + beyond)))


def half_cosine(first, last, t):
    """From `first` at t = 0 to `last` at t = 1 and after."""
    return last + (first - last) * 0.5 * (1 + np.cos(np.pi * np.clip(t, 0, 1)))


def line(first, last, t):
    return first + (last - first) * np.clip(t, 0, 1)


N = np.arange(TOTAL + 5)
DEFINITIONS = {  # spec → (steps of linear warmup, the rate at each step after it)
    "constant(0.3)": (0, np.full(105, 0.3)),
    "constant(0.3, warmup='10%')": (10, np.full(105, 0.3)),
    "constant(0.3, warmup='1 steps')": (1, np.full(105, 0.3)),
    "constant(0.3, warmup='100%')": (100, np.full(105, 0.3)),
    "constant(1)": (0, np.ones(105)),
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
    """Warmup is (n + 1) / warmup of the peak, which the first step after it has too; the end is kept for good."""
    warmup, expected = DEFINITIONS[text]
    expected = np.where(warmup > N, expected[warmup] * (N + 1) / max(1, warmup), expected)
    out = rates(text)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=0.3 * rounding(20))  # of terms up to the peak, 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("constant(0.1, warmup='101 steps')", "a warmup of 101 steps is longer than the whole run of 100 steps"),
        ("one_cycle(0.1, warmup='6 epochs')", "a warmup of 120 steps is longer"),
        ("cosine(0.1, warmup='200%')", "a warmup of 200 steps is longer"),
        ("linear(0.1, warmup='5')", "schedule='5' is not a duration; write '5 epochs'"),
        ("step(0.1, at=('5 min',))", "schedule='5 min' is not a duration"),
        ("step(0.1, at=('5%',), warmup='10%')", "every duration in at=.* must lie after warmup='10%'"),
        ("step(0.1, at=('',))", "must lie after warmup"),
        ("cosin(0.1)", "unknown schedule 'cosin': did you mean 'cosine'"),
        ("cosine(0.1, warm='5%')", "unknown argument 'warm': did you mean 'warmup'"),
        ("cosine", "missing a required argument: 'peak'"),
        ("cosine(0.1, total=3)", "unknown argument 'total'"),
    ],
)
def test_build_refuses_a_wrong_schedule(text, message):
    with pytest.raises(UserError, match=message):
        schedules.build(text, steps, TOTAL)


def test_a_run_of_one_step_has_every_schedule():
    """Durations are rounded up to whole steps, so the warmup is the whole run."""
    for text in ("constant(0.3, warmup='5%')", "cosine(0.3)", "cosine(0.3, warmup='5%')", "linear(0.3, warmup='5%')"):
        np.testing.assert_allclose(rates(text, total=1, beyond=0), 0.3, rtol=1e-6)


PARAMS = {"w": np.array([[0.5, -1.0], [2.0, 0.1]]), "b": np.array([1.0, -3.0])}
GRADS = [{"w": np.array([[0.1, 0.2], [-0.3, 1.0]]), "b": np.array([-1.0, 0.5])},
         {"w": np.array([[-0.4, 0.1], [0.3, 2.0]]), "b": np.array([0.7, 0.5])}]  # fmt: skip


def sgd(p, grads, rate):
    return p - rate(0) * grads[0] - rate(1) * grads[1]


def nesterov(p, grads, rate):
    """Sutskever et al. 2013: the velocity v ← 0.9 v + g, and a step along g + 0.9 v."""
    v = 0
    for n, g in enumerate(grads):
        v = 0.9 * v + g
        p = p - rate(n) * (g + 0.9 * v)
    return p


def momentum(p, grads, rate):
    v = grads[0]
    p = p - rate(0) * v
    return p - rate(1) * (0.8 * v + grads[1])


def adam(p, grads, rate, decay=0.0, b2=0.999, eps=1e-8):
    """Kingma and Ba 2015, with the decoupled weight decay of Loshchilov and Hutter 2019."""
    m = v = 0
    for n, g in enumerate(grads):
        m, v = 0.9 * m + 0.1 * g, b2 * v + (1 - b2) * g**2
        step = m / (1 - 0.9 ** (n + 1)) / (np.sqrt(v / (1 - b2 ** (n + 1))) + eps)
        p = p - rate(n) * (step + decay * p)
    return p


def lion(p, grads, rate):
    """Chen et al. 2023: the sign of the interpolated momentum, and decoupled weight decay."""
    m = 0
    for n, g in enumerate(grads):
        p = p - rate(n) * (np.sign(0.9 * m + 0.1 * g) + 0.01 * p)
        m = 0.99 * m + 0.01 * g
    return p


def rmsprop(p, grads, rate):
    v = 0
    for n, g in enumerate(grads):
        v = 0.9 * v + 0.1 * g**2
        p = p - rate(n) * g / np.sqrt(v + 1e-8)
    return p


def nadam(p, grads, rate):
    """Dozat 2016, with a constant b1."""
    m = v = 0
    for n, g in enumerate(grads):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        ahead = 0.9 * m / (1 - 0.9 ** (n + 2)) + 0.1 * g / (1 - 0.9 ** (n + 1))
        p = p - rate(n) * ahead / (np.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8)
    return p


BY_HAND = {
    "sgd": sgd,
    "sgd(momentum=0.8)": momentum,
    "sgd(momentum=0.9, nesterov=True)": nesterov,
    "adam": adam,
    "adam(b2=0.95, eps=0.1)": functools.partial(adam, b2=0.95, eps=0.1),
    "adamw(weight_decay=0.1)": functools.partial(adam, decay=0.1),
    "lion(weight_decay=0.01)": lion,
    "rmsprop": rmsprop,
    "nadam": nadam,
}


def updated(text, clip=0.0):
    """PARAMS after both gradients, in float32, at rate 0.1 and then 0.2."""
    optimizer = optimizers.build(text, lambda count: 0.1 * (count + 1), clip)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.float32, PARAMS)
    state = optimizer.init(params)
    for grads in GRADS:
        params, state = update(params, state, jax.tree.map(jnp.float32, grads))
    return params


def bias_correction(text):
    """The relative error of Adam's step: 1 - b2 has the rounding of b2, a number near 1; a square root halves it."""
    if "adam" not in text:
        return 0.0
    return rounding(3) / (2 * (1 - (0.95 if "b2=0.95" in text else 0.999)))


@pytest.mark.parametrize("text", BY_HAND)
def test_an_optimizer_is_the_update_of_its_paper(text):
    """Two updates, at the two rates of a schedule, in strict dtype promotion."""
    out = updated(text)
    for name, p in PARAMS.items():
        expected = BY_HAND[text](p, [g[name] for g in GRADS], lambda n: 0.1 * (n + 1))
        np.testing.assert_allclose(out[name], expected, rtol=0, atol=3 * rounding(2 * 15) + 0.1 * bias_correction(text))


def norm(grads):
    return np.sqrt(sum((g**2).sum() for g in grads.values()))


@pytest.mark.parametrize("clip", [0.5, 1.8, 100.0])
def test_clip_bounds_the_norm_over_all_parameters_together(clip):
    """A longer gradient is scaled to the norm, a shorter one left as it is."""
    assert 1.5 < norm(GRADS[0]) < 1.8 < norm(GRADS[1]) < 100  # so that 1.8 clips the second alone
    out = updated("sgd", clip)
    for name, p in PARAMS.items():
        grads = [g[name] * min(1, clip / norm(g)) for g in GRADS]
        np.testing.assert_allclose(out[name], sgd(p, grads, lambda n: 0.1 * (n + 1)), rtol=0, atol=3 * rounding(20))


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
def test_every_optimizer_that_is_offered_runs():
    """Each name that an error lists as allowed, with its defaults, moves the parameters at all."""
    with pytest.raises(UserError, match="allowed: ") as error:
        optimizers.build("none", optax.constant_schedule(0.1), 0.0)
    names = str(error.value).split("allowed: ")[1].split(", or an import")[0].split(", ")
    assert {"adam", "adamw", "lamb", "lion", "muon", "nadamw", "prodigy", "sgd"} <= set(names)
    params = jax.tree.map(jnp.float32, PARAMS)

    def loss(params, obj_fn=None, grad_fn=None):  # whose gradient is the parameters
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params)) / 2

    given = {"value_fn": loss, "obj_fn": loss, "grad_fn": lambda p, *_: p}
    for name in names:
        text = {"mechanize": "mechanize('sgd', s_init=1e-2)", "schedule_free": "schedule_free('sgd')"}.get(name, name)
        optimizer = optimizers.build(text, optax.constant_schedule(0.1), 1.0)

        @jax.jit
        def five_steps(params, optimizer=optimizer):
            first, state = params, optimizer.init(params)
            for _ in range(5):
                grads = {**given, "value": loss(params), "grad": params}
                updates, state = optimizer.update(params, state, params, **grads)
                params = optax.apply_updates(params, updates)
            return jax.tree.map(lambda a, b: jnp.any(a != b), first, params)

        moves = five_steps(params)
        assert all(jax.tree.leaves(moves)), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adm", "unknown optimizer 'adm': did you mean 'adam'"),
        ("momentum", "unknown optimizer 'momentum'"),
        ("adam(beta1=0.9)", "unknown argument 'beta1': did you mean 'b1'"),
        ("adamw(learning_rate=0.1)", "unknown argument 'learning_rate'"),
        ("adam(0.1)", r"optimizer='adam\(0.1\)': name the arguments.*the learning rate is the schedule's"),
        ("adam|sgd", "expected exactly one"),
    ],
)
def test_build_refuses_a_wrong_optimizer(text, message):
    with pytest.raises(UserError, match=message):
        optimizers.build(text, optax.constant_schedule(0.1), 0.0)

"""Every optimizer of optax that needs more than the gradient or a schedule, against a loop with optax by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import thorough

from imgclf_jax import recipe, step
from imgclf_jax.core import sharding
from imgclf_jax.optim import optimizers, rules, schedules
from imgclf_jax.optim.weight_averages import evaluated_by
from imgclf_jax.programs import Programs
from imgclf_jax.run.provenance import DataInfo

STEPS = 20
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (STEPS, 32, 6, 6, 1), np.uint8), RNG.integers(0, 3, (STEPS, 32), np.int32)
SCHEDULE = "cosine(0.05, warmup='20%')"
RATE = schedules.build(SCHEDULE, lambda duration: {"20%": 4, "": 0}[duration], STEPS)

contrib = optax.contrib


# By spec, optax's own optimizer, with the schedule where optax takes one.
BY_HAND = {
    "schedule_free_sgd(b1=0.8, weight_decay=1e-2)": lambda: contrib.schedule_free_sgd(RATE, None, 0.8, 1e-2),
    "schedule_free_adamw(weight_decay=1e-2)": lambda: contrib.schedule_free_adamw(RATE, weight_decay=1e-2),
    "optax.contrib:momo(weight_decay=1e-3, adapt_lower_bound=True)": lambda: contrib.momo(RATE, 0.9, 0.0, 1e-3, True),
    "optax.contrib:momo_adam": lambda: contrib.momo_adam(RATE),
    "optax:lbfgs(memory_size=3, linesearch=None)": lambda: optax.lbfgs(RATE, 3, linesearch=None),
}


def parts(text, schedule=SCHEDULE, **more):
    from imgclf_jax.config import default_config

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

    opt_state = optimizers.seed_keys(optimizer.init(params), 5)
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


def test_the_memory_of_lbfgs_is_sharded_as_the_parameters(fake_config):
    """The last updates are one array [memory, *shape], also with an axis for the seeds."""
    fake_config.update(
        {"optimizer": "optax:lbfgs(memory_size=3, linesearch=None)", "model": "mlp(widths=(128,))", "mesh": "fsdp=-1"}
    )
    for seeds in (1, 2):
        fake_config.num_seeds = seeds
        programs = Programs(recipe.Recipe(fake_config, DataInfo(64, (12, 12, 1), ("a", "b", "c", "d"), "")),
                            sharding.make_mesh(text="fsdp=-1"))  # fmt: skip
        state = programs.state_shape
        kernels = [x["backbone"]["dense0"]["kernel"] for x in (state.params, state.opt_state[0].diff_params_memory)]
        assert [x.shape for x in kernels] == [(*(2,) * (seeds - 1), *more, 144, 128) for more in ((), (3,))]
        assert [tuple(x.sharding.spec) for x in kernels] == [
            (*(None,) * (seeds - 1), *more, "fsdp") for more in ((), (None,))
        ]


START = {"a": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.linspace(0.5, 1.5, 3), "c": jnp.float32([0.3])}


def curved(params):
    """A loss in which all parameters interact."""
    return jnp.sum((params["a"] ** 2 + 0.1) @ params["b"]) + jnp.sum(jnp.cos(params["a"] * params["c"])) ** 2


def descend(optimizer, loss, params, steps=8):
    """The parameters and the optimizer's state after some steps on a loss, with its value as the extra argument."""

    @jax.jit
    def update(params, opt_state):
        with jax.numpy_dtype_promotion("standard"):
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params, value=value)
            return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for _ in range(steps):
        params, opt_state = update(params, opt_state)
    return params, opt_state


def build(text, **more):
    return optimizers.build(text, optax.constant_schedule(0.1), 0.0, rules.Rules(**more))


def test_an_optimizer_that_reads_the_loss_leaves_frozen_parameters():
    """They keep every bit."""
    ours, _ = descend(build("optax.contrib:momo", frozen=frozenset("b")), curved, START)
    free = {name: x for name, x in START.items() if name != "b"}
    theirs, _ = descend(contrib.momo(0.1), lambda free: curved({**free, "b": START["b"]}), free)
    np.testing.assert_array_equal(ours.pop("b"), START["b"])
    close(ours, theirs, free)


@pytest.mark.parametrize(("text", "of_a", "of_c", "more"), [
    ("schedule_free_adamw(weight_decay=0.2)", contrib.schedule_free_adamw(0.1, weight_decay=0.1),
     contrib.schedule_free_adamw(0.1), {"decay": {"a": 0.5, "c": 0.0}}),
])  # fmt: skip
def test_rules_of_schedule_free(text, of_a, of_c, more):
    """Another weight decay per parameter equals a separate optimizer for each."""
    optimizer = build(text, frozen=frozenset("b"), **more)
    ours, state = descend(optimizer, bowls, START)
    evaluated = evaluated_by(optimizer)(state, ours)
    np.testing.assert_array_equal(evaluated["b"], START["b"])
    for name, by_hand in (("a", of_a), ("c", of_c)):
        params, opt_state = descend(optax.with_extra_args_support(by_hand), bowls, {name: START[name]})
        close(ours[name], params[name], START[name])
        close(evaluated[name], contrib.schedule_free_eval_params(opt_state, params)[name], START[name])


def bowls(params):
    """A loss in which no parameters interact."""
    return sum(jnp.sum((x - 0.2) ** 2) for x in params.values())

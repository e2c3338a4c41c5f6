"""Every optimizer of optax that needs more than the gradient or a schedule, against a loop with optax by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import thorough
from optax import contrib

from imgclf_jax import recipe, step
from imgclf_jax.config import default_config
from imgclf_jax.optim import schedules

STEPS = 20
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (STEPS, 32, 6, 6, 1), np.uint8), RNG.integers(0, 3, (STEPS, 32), np.int32)
SCHEDULE = "cosine(0.05, warmup='20%')"
RATE = schedules.build(SCHEDULE, lambda duration: {"20%": 4, "": 0}[duration], STEPS)

# By spec, optax's own optimizer, with the schedule where optax takes one.
BY_HAND = {
    "schedule_free_sgd(b1=0.8, weight_decay=1e-2)": lambda: contrib.schedule_free_sgd(RATE, None, 0.8, 1e-2),
    "schedule_free_adamw(weight_decay=1e-2)": lambda: contrib.schedule_free_adamw(RATE, weight_decay=1e-2),
    "optax.contrib:momo(weight_decay=1e-3, adapt_lower_bound=True)": lambda: contrib.momo(RATE, 0.9, 0.0, 1e-3, True),
    "optax.contrib:momo_adam": lambda: contrib.momo_adam(RATE),
    "optax:lbfgs(memory_size=3, linesearch=None)": lambda: optax.lbfgs(RATE, 3, linesearch=None),
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

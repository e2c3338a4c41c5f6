"""The optimizers of optax that run, and the reasons for those that cannot, however they are wrapped."""

import jax
import jax.numpy as jnp
import optax
import pytest

from imgclf_jax.core.errors import UserError
from imgclf_jax.optim import optimizers, rules, schedules, weight_averages


def run(text, params, **more):
    """Traces the first update, with the arguments of the train step."""
    optimizer = optimizers.build(text, optax.constant_schedule(0.1), 0.5, rules.Rules(**more))
    jax.eval_shape(lambda params: optimizer.update(params, optimizer.init(params), params, value=1.0), params)


def schedule_free(learning_rate):
    return optax.contrib.schedule_free_sgd(learning_rate)


def wrapped_schedule_free(learning_rate):
    """In every wrapper of optax around one transformation."""
    inner = optax.inject_hyperparams(optax.contrib.schedule_free_sgd)(learning_rate=0.1)
    masked = optax.masked(optax.chain(optax.clip(1.0), inner), {"a": True, "b": False})
    return optax.MultiSteps(optax.apply_if_finite(masked, 3), 2).gradient_transformation()


def transparent_sam(learning_rate):
    return optax.contrib.sam(optax.sgd(learning_rate), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))


def private(learning_rate):
    return optax.chain(optax.contrib.differentially_private_aggregate(1.0, 0.1, key=0), optax.sgd(learning_rate))


def opaque_sam(learning_rate):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(optax.sgd(learning_rate), adversary, opaque_mode=True)


def no_optimizer(learning_rate):
    return "sgd"


@pytest.mark.parametrize(("function", "message"), [
    (schedule_free, "ScheduleFreeState cannot be used, since it evaluates other parameters than it trains"),
    (wrapped_schedule_free, "ScheduleFreeState cannot be used"),
    (transparent_sam, r"SAMState cannot be used, since gradient='sam\(rho=0\.05\)' computes"),
    (private, "DifferentiallyPrivateAggregateState cannot be used, since it needs per-example gradients"),
    (opaque_sam, r"SAMState cannot be used, .*gradient='sam\(rho=0\.05\)' computes it"),
    (no_optimizer, "no_optimizer returns a str, not an optax.GradientTransformation"),
])  # fmt: skip
def test_own_optimizers_that_cannot_run_right_are_told(function, message):
    """By their state, or by the arguments of their update, however they are wrapped."""
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 3))}
    with pytest.raises(UserError, match=f"optimizer='{__name__}:{function.__name__}': .*{message}"):
        run(f"{__name__}:{function.__name__}", params)


@pytest.mark.parametrize("text", ["optax:lookahead", "optax.contrib:sam", "optax.contrib:dpsgd"])
def test_what_optax_has_and_cannot_run_is_refused(text):
    """By the arguments that a spec cannot give, or by the state."""
    with pytest.raises(UserError, match=text):
        run(text, {"a": jnp.ones(2)})


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_runs(name):
    run(name, {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}})


def by_hand_evaluated(learning_rate):
    """A user's wrapper around schedule-free that declares its evaluated parameters."""
    inner = optax.chain(optax.clip(1.0), optax.contrib.schedule_free_sgd(learning_rate))
    return weight_averages.with_evaluated(
        inner, lambda state, params: optax.contrib.schedule_free_eval_params(state[1], params)
    )


@pytest.mark.parametrize(("text", "message", "more"), [
    ("schedule_free_adamw", r"rules\.layer_decay would scale; use another optimizer", {"lr": {"a": 0.5}}),
    (f"{__name__}:by_hand_evaluated", r"by_hand_evaluated tracks its own updates", {"lr": {"a": 0.5}}),
])  # fmt: skip
def test_what_does_not_fit_together_is_told(text, message, more):
    with pytest.raises(UserError, match=message):
        run(text, {"a": jnp.ones(2), "b": jnp.ones((2, 3))}, **more)


def test_schedules_and_optimizers_are_not_mixed_up():
    with pytest.raises(
        UserError, match=r"optimizer='optax:cosine_decay_schedule\(100\)': .* returns a function, not an"
    ):
        optimizers.build("optax:cosine_decay_schedule(100)", optax.constant_schedule(0.1), 0.0)
    with pytest.raises(
        UserError,
        match=r"schedule='.*:rate_of_an_optimizer' returns a GradientTransformation.*; it must return a function",
    ):
        schedules.build(f"{__name__}:rate_of_an_optimizer", int, 10)


def rate_of_an_optimizer(steps, total):
    return optax.adam(1e-3)

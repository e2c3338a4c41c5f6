"""Which optimizers of optax run, and that those which cannot run right say why, however they are wrapped."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

from imgclf_jax.core.errors import UserError
from imgclf_jax.optim import optimizers, schedules


def run(text, params):
    """Traces the first update."""
    optimizer = optimizers.build(text, optax.constant_schedule(0.1), 0.5)
    jax.eval_shape(lambda params: optimizer.update(params, optimizer.init(params), params), params)


def schedule_free(learning_rate):
    return optax.contrib.schedule_free_sgd(learning_rate)


def wrapped_schedule_free(learning_rate):
    """In all that optax wraps one transformation into another with."""
    inner = optax.inject_hyperparams(optax.contrib.schedule_free_sgd)(learning_rate=0.1)
    masked = optax.masked(optax.chain(optax.clip(1.0), inner), {"a": True, "b": False})
    return optax.MultiSteps(optax.apply_if_finite(masked, 3), 2).gradient_transformation()


def transparent_sam(learning_rate):
    return optax.contrib.sam(optax.sgd(learning_rate), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))


def optax_lookahead(learning_rate):
    return optax.lookahead(optax.sgd(learning_rate), 5, 0.5)


def private(learning_rate):
    return optax.chain(optax.contrib.differentially_private_aggregate(1.0, 0.1, key=0), optax.sgd(learning_rate))


def line_search(learning_rate):
    return optax.chain(optax.sgd(learning_rate), optax.scale_by_backtracking_linesearch(5))


def on_plateau(learning_rate):
    return optax.chain(optax.sgd(learning_rate), optax.contrib.reduce_on_plateau())


def sophia(learning_rate):
    return optax.contrib.sophia(learning_rate)


def no_optimizer(learning_rate):
    return "sgd"


@pytest.mark.parametrize(("function", "message"), [
    (schedule_free, "ScheduleFreeState cannot be used, since it trains the parameters y, while those to evaluate, x"),
    (wrapped_schedule_free, "ScheduleFreeState cannot be used"),
    (transparent_sam, "SAMState cannot be used, since its steps alternate between the weights and perturbed ones"),
    (optax_lookahead, r"LookaheadState cannot be used.*\|lookahead\(k, alpha\) instead"),
    (private, "DifferentiallyPrivateAggregateState cannot be used, since it needs the gradient of each example"),
    (line_search, "needs 'value', 'grad', and 'value_fn' at each update, which the train step does not give"),
    (on_plateau, "needs 'value' at each update"),
    (sophia, "needs obj_fn at each update"),
    (no_optimizer, "no_optimizer gives a str, and not an optax.GradientTransformation"),
])  # fmt: skip
def test_own_optimizers_that_cannot_run_right_are_told(function, message):
    """By what their state is, or what their update asks for, however they are wrapped."""
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 3))}
    with pytest.raises(UserError, match=f"optimizer='{__name__}:{function.__name__}': .*{message}"):
        run(f"{__name__}:{function.__name__}", params)


@pytest.mark.filterwarnings("ignore")
def test_each_optimizer_of_optax_runs_or_says_why_not():
    """Every public function of optax and optax.contrib that takes a learning rate, by its name and by its path."""
    params = {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    ran = set()
    for module in (optax, optax.contrib):
        for name in dir(module):
            rate = getattr(module, name, None)
            if name.startswith(("_", "scale_by_")) or not callable(rate) or isinstance(rate, type):
                continue
            if "learning_rate" not in next(iter(inspect.signature(rate).parameters), ""):
                continue
            for text in (name, f"{module.__name__}:{name}"):
                if name in optimizers.UNFIT:
                    with pytest.raises(UserError, match=f"{name} cannot be used, since"):
                        run(text, params)
                elif text != "galore":  # which its path alone names
                    run(text, params)
                    ran.add(name)
    assert len(ran) > 35
    for name in ("sam", "lookahead", "schedule_free", "mechanize", "reduce_on_plateau"):
        with pytest.raises(UserError, match=f"{name} cannot be used, since"):
            optimizers.build(name if name != "lookahead" else "optax:lookahead", optax.constant_schedule(0.1), 0.0)


def test_schedules_and_optimizers_are_not_mixed_up():
    with pytest.raises(
        UserError, match=r"optimizer='optax:cosine_decay_schedule\(100\)': .* gives a function, such as"
    ):
        optimizers.build("optax:cosine_decay_schedule(100)", optax.constant_schedule(0.1), 0.0)
    with pytest.raises(
        UserError, match=r"schedule='.*:rate_of_an_optimizer' gives an optimizer, which has a key of its"
    ):
        schedules.build(f"{__name__}:rate_of_an_optimizer", int, 10)


def rate_of_an_optimizer(steps, total):
    return optax.adam(1e-3)

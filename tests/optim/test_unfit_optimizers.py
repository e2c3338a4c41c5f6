"""The optimizers of optax that run, and the reasons for those that cannot, however they are wrapped."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

from imgclf_jax.core.errors import UserError
from imgclf_jax.methods.gradients import Gradient
from imgclf_jax.optim import optimizers, rules, schedules, weight_averages


def run(text, params, **more):
    """Traces the first update, with the arguments of the train step."""
    optimizer = optimizers.build(text, optax.constant_schedule(0.1), 0.5, rules.Rules(**more))
    gradient = Gradient(lambda params, *_: ((jnp.float32(1), None), params), None)

    def update(params):
        extra = gradient.extra_arguments(jnp.float32(1), params, None, None, None)
        return optimizer.update(params, optimizer.init(params), params, **extra)

    jax.eval_shape(update, params)


def schedule_free(learning_rate):
    return optax.contrib.schedule_free_sgd(learning_rate)


def wrapped_schedule_free(learning_rate):
    """In every wrapper of optax around one transformation."""
    inner = optax.inject_hyperparams(optax.contrib.schedule_free_sgd)(learning_rate=0.1)
    masked = optax.masked(optax.chain(optax.clip(1.0), inner), {"a": True, "b": False})
    return optax.MultiSteps(optax.apply_if_finite(masked, 3), 2).gradient_transformation()


def transparent_sam(learning_rate):
    return optax.contrib.sam(optax.sgd(learning_rate), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))


def optax_lookahead(learning_rate):
    return optax.lookahead(optax.sgd(learning_rate), 5, 0.5)


def private(learning_rate):
    return optax.chain(optax.contrib.differentially_private_aggregate(1.0, 0.1, key=0), optax.sgd(learning_rate))


def opaque_sam(learning_rate):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(optax.sgd(learning_rate), adversary, opaque_mode=True)


def low_rank(learning_rate):
    return optax.chain(optax.clip(1.0), optax.contrib.galore(learning_rate, 2))


def needs_more(learning_rate):
    def update(updates, state, params=None, *, hessian, labels, **extra):
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def no_optimizer(learning_rate):
    return "sgd"


@pytest.mark.parametrize(("function", "message"), [
    (schedule_free, "ScheduleFreeState cannot be used, since it trains the parameters y but evaluates x"),
    (wrapped_schedule_free, "ScheduleFreeState cannot be used"),
    (transparent_sam, "SAMState cannot be used, since each of its steps needs a second gradient"),
    (optax_lookahead, r"LookaheadState cannot be used.*\|lookahead\(k, alpha\) instead"),
    (private, "DifferentiallyPrivateAggregateState cannot be used, since it needs per-example gradients"),
    (opaque_sam, r"SAMState cannot be used, .*gradient='sam\(rho=0\.05\)' takes it for every optimizer"),
    (low_rank, "GaLoreState cannot be used, since its state has arrays of size zero"),
    (needs_more, "needs 'hessian' and 'labels' at each update, which the train step does not pass"),
    (no_optimizer, "no_optimizer returns a str, not an optax.GradientTransformation"),
])  # fmt: skip
def test_own_optimizers_that_cannot_run_right_are_told(function, message):
    """By their state, or by the arguments of their update, however they are wrapped."""
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 3))}
    with pytest.raises(UserError, match=f"optimizer='{__name__}:{function.__name__}': .*{message}"):
        run(f"{__name__}:{function.__name__}", params)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_each_optimizer_of_optax_runs_or_says_why_not():
    """Every public function of optax and optax.contrib that takes a learning rate, by its name and by its path.

    And all of contrib that give an optimizer in other ways; what is left are parts of optimizers.
    """
    params = {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    unfit = {name: name for name in ("differentially_private_aggregate", "dpsgd", "sam")}
    spelled = {"mechanize": "mechanize('adam')", "schedule_free": "schedule_free('sgd')", "normalize": "", **unfit,
               "reduce_on_plateau": "sgd|reduce_on_plateau", "split_real_and_imaginary": ""}  # fmt: skip
    ran = set()
    for module in (optax, optax.contrib):
        for name in dir(module):
            rate = getattr(module, name, None)
            if name.startswith(("_", "scale_by_")) or not callable(rate) or isinstance(rate, type):
                continue
            if "learning_rate" not in next(iter(inspect.signature(rate).parameters), ""):
                if module is optax or name.endswith(("_params", "_hessian")):
                    continue
                assert name in spelled
            by_name = spelled.get(name, name)
            for text in (by_name, by_name.replace(name, f"{module.__name__}:{name}")) if by_name else ():
                if name in optimizers.UNFIT:
                    with pytest.raises(UserError, match=f"{name} cannot be used, since"):
                        run(text, params)
                else:
                    run(text, params)
                    ran.add(name)
    assert len(ran) > 45
    with pytest.raises(UserError, match="lookahead cannot be used, since"):
        run("optax:lookahead", params)


def by_hand_evaluated(learning_rate):
    """A user's wrapper around schedule-free that declares its evaluated parameters."""
    inner = optax.chain(optax.clip(1.0), optax.contrib.schedule_free_sgd(learning_rate))
    return weight_averages.with_evaluated(
        inner, lambda state, params: optax.contrib.schedule_free_eval_params(state[1], params)
    )


@pytest.mark.parametrize(("text", "message", "more"), [
    ("schedule_free_sgd(warmup_steps=5)", r"takes no warmup_steps here; warm up in the schedule, as in", {}),
    ("schedule_free_adamw", r"rules\.layer_decay would scale; .*as in schedule_free\('sgd'\)", {"lr": {"a": 0.5}}),
    (f"{__name__}:by_hand_evaluated", r"by_hand_evaluated tracks its own updates", {"lr": {"a": 0.5}}),
    ("mechanize('adam')|reduce_on_plateau(patience=3)", r"which reduce_on_plateau\(patience=3\) would scale", {}),
    ("madgrad", "madgrad tracks its own updates, which rules.lr .* would change; use another", {"lr": {"a": 0.5}}),
    ("optax.contrib:cocob", "cocob tracks its own updates, which rules.lr", {"lr": {"a": 0.5}}),
    ("cocob|reduce_on_plateau(0.5)", r"which reduce_on_plateau\(0\.5\) would change", {}),
    ("madgrad|lookahead(5)", r"which lookahead\(5\) would change", {}),
    ("mechanize('madgrad')", "madgrad tracks its own updates, which mechanize would change", {}),
    ("mechanize(0.1)", r"takes an optimizer's spec in quotes, without lookahead, as in mechanize\('sgd'\)", {}),
    ("mechanize('sgd|lookahead(5)')", "in quotes, without lookahead", {}),
    ("mechanize", "missing a required argument: 'base_optimizer'", {}),
    ("mechanize('adam', 0.1)", r"name the arguments, as in mechanize\(\.\.\.=0\.1\)", {}),
    ("mechanize('schedule_free_sgd')", "schedule_free_sgd evaluates other parameters than it trains", {}),
    ("mechanize('adamm')", "unknown optimizer 'adamm': did you mean 'adam", {}),
    ("sgd|reduce_on_plateau(0.1)|adam", "expected exactly one optimizer", {}),
    ("reduce_on_plateau(0.1)", "after it reduce_on_plateau and lookahead", {}),
    ("sgd|reduce_on_plateau(factor=2.0)", r"Factor must be in the range", {}),
    ("mechanize('sgd')", r"rules\.decay: .*has no weight decay to multiply", {"decay": {"a": 0.0}}),
    ("momo", "rules.decay: momo finds one step size", {"decay": {"a": 0.0}}),
])  # fmt: skip
def test_what_does_not_fit_together_is_told(text, message, more):
    with pytest.raises(UserError, match=message):
        run(text, {"a": jnp.ones(2), "b": jnp.ones((2, 3))}, **more)


def test_schedules_and_optimizers_are_not_mixed_up():
    with pytest.raises(
        UserError, match=r"optimizer='optax:cosine_decay_schedule\(100\)': .* returns a function, such as"
    ):
        optimizers.build("optax:cosine_decay_schedule(100)", optax.constant_schedule(0.1), 0.0)
    with pytest.raises(
        UserError, match=r"schedule='.*:rate_of_an_optimizer' returns an optimizer, whose key is optimizer"
    ):
        schedules.build(f"{__name__}:rate_of_an_optimizer", int, 10)


def rate_of_an_optimizer(steps, total):
    return optax.adam(1e-3)

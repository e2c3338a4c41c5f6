"""Optimizers: optax's, by optax's own names, with other transforms of the gradient before them."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from imgclf_jax.core import spec, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.optim.rules import Rules

# What of optax cannot run here, and why. `own` is another optimizer's name, which may do instead.
_NO_SCHEDULE = "it takes no schedule of the learning rate"
_BY_PATH = "a function of your own that returns it, named by its import path, is given "
_NEEDS_LOSS = "its learning rate is not checked here; " + _BY_PATH + "the loss at each update"
_BY_EXAMPLE = "it needs the gradient of each example, and the train step computes that of their mean"
_SCHEDULE_FREE = ("it trains the parameters y, while those to evaluate, x, are in its state, where neither evaluation "
                  "nor prediction looks; ema=0.999 averages weights here")  # fmt: skip
_SAM = ("its steps alternate between the weights and perturbed ones, and evaluation or the end of the run may fall on "
        "the perturbed ones; the key gradient='sam(0.05)' takes both gradients in one step")  # fmt: skip
_LOOKAHEAD = "it wants two sets of parameters; end the optimizer's spec with |lookahead(k, alpha) instead"
UNFIT = {
    "differentially_private_aggregate": _BY_EXAMPLE,
    "dpsgd": _BY_EXAMPLE,
    "lbfgs": "its line search is not checked here; " + _BY_PATH + "the loss as a function",
    "lookahead": _LOOKAHEAD,
    "mechanize": "it takes an optimizer and not the learning rate; a function of your own can put both together",
    "momo": _NEEDS_LOSS,
    "momo_adam": _NEEDS_LOSS,
    "optimistic_adam": _NO_SCHEDULE + "; optimistic_adam_v2 does",
    "polyak_sgd": _NEEDS_LOSS,
    "reduce_on_plateau": _NEEDS_LOSS,
    "rprop": _NO_SCHEDULE,
    "sam": _SAM,
    "schedule_free": _SCHEDULE_FREE,
    "schedule_free_adamw": _SCHEDULE_FREE,
    "schedule_free_sgd": _SCHEDULE_FREE,
    "sm3": _NO_SCHEDULE,
    "sophia": "it wants the loss as a function by another name, obj_fn, than the train step gives it",
}

# What it is known by inside of other transformations: its state. (Of those that fail without a value, see `_checked`.)
_UNFIT_STATES = {
    optax.LookaheadState: _LOOKAHEAD,
    optax.contrib.DifferentiallyPrivateAggregateState: _BY_EXAMPLE,
    optax.contrib.SAMState: _SAM,
    optax.contrib.ScheduleFreeState: _SCHEDULE_FREE,
}

# The optimizers of optax.contrib that need the gradient only.
_CONTRIB = ("acprop", "ademamix", "adopt", "cocob", "dadapt_adamw", "dog", "dowg", "madgrad", "prodigy",
            "simplified_ademamix")  # fmt: skip

# These estimate one step size from all parameters together. A weight decay for each parameter would need several.
_ONE_STEP_SIZE = ("dadapt_adamw", "dog", "dowg", "prodigy")

# What may stand before the optimizer.
_TRANSFORMS = ("adaptive_grad_clip", "add_decayed_weights", "centralize", "clip", "clip_by_block_rms",
               "clip_by_global_norm", "normalize_by_update_norm", "zero_nans")  # fmt: skip
TRANSFORMS = {name: getattr(optax, name) for name in _TRANSFORMS}

_NO_RULES = Rules()

# The names that optax's functions have for the weight decay.
_DECAYS = ("weight_decay", "weight_decay_rate", "adam_weight_decay")


def _matrices(params: Any) -> Any:
    """For Muon: which axes of a parameter are the rows and columns of a matrix; None if Adam updates the parameter.

    Kernels are matrices; those of convolutions are flattened to [kh * kw * c, f]. Adam updates the head's kernel, as
    Muon's author advises. He gives a network's first convolution to Adam too, which is Muon's here.
    """

    def axes(name: str, x: Any) -> Any:
        if not name.endswith("kernel") or name.startswith("head/") or x.ndim not in (2, 4):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return tree.map_named(axes, params)


def _noisy_sgd(
    learning_rate: optax.Schedule, eta: float = 0.01, gamma: float = 0.55, key: int = 0
) -> optax.GradientTransformation:
    """optax's, which warns if it gets no key; `seed_keys` adds the run's seed to the key."""
    return optax.noisy_sgd(learning_rate, eta, gamma, key)


@functools.cache
def _optimizers() -> dict[str, object]:
    """Every public optax function whose first parameter is `learning_rate`, a schedule."""
    out: dict[str, object] = {name: getattr(optax.contrib, name) for name in _CONTRIB}
    for name in dir(optax):
        function = getattr(optax, name)
        if not callable(function) or isinstance(function, type):
            continue
        if spec.takes(function, "learning_rate") and name not in UNFIT and not name.startswith(("_", "scale_by_")):
            out[name] = function
    out["noisy_sgd"] = _noisy_sgd
    out["muon"] = functools.partial(optax.contrib.muon, muon_weight_dimension_numbers=_matrices)
    return out


def split_lookahead(text: str) -> tuple[list[spec.Call], spec.Call | None]:
    """The calls of an optimizer spec without the `lookahead(…)` that may end it, and this call or None.

    `lookahead` averages weights and does not change the gradient: see `weight_averages`.
    """
    calls = spec.parse(text)
    return (calls[:-1], calls[-1]) if calls and calls[-1].name == "lookahead" else (calls, None)


def build(text: str, schedule: optax.Schedule, clip: float, rules: Rules = _NO_RULES) -> optax.GradientTransformation:
    """The optimizer that a spec such as `add_decayed_weights(5e-4)|sgd(momentum=0.9)` names.

    Its parts, in this order: clipping to the global norm `clip` (0: no clipping), the transforms before the optimizer,
    the optimizer with the learning rate `schedule`, and the learning rates of `rules`. Frozen parameters get no update
    and have no state. Its first state still needs `seed_keys`. Raises UserError for a spec that names no optimizer, has
    arguments that do not fit, or has no weight decay that `rules.decay` could multiply.
    """
    calls, _ = split_lookahead(text)
    if not calls or [call.name for call in calls[:-1] if call.name in _optimizers()]:
        raise UserError(f"optimizer={text!r}: expected exactly one optimizer; before it may stand "
                        f"{', '.join(TRANSFORMS)}, after it lookahead")  # fmt: skip
    *before, last = calls
    module, _, name = last.name.rpartition(":")
    if name in UNFIT and (not module or module.split(".")[0] == "optax"):
        raise UserError(f"optimizer={text!r}: {name} cannot be used, since {UNFIT[name]}")
    makers: list[Any] = [(spec.bind(call, TRANSFORMS, "transform before the optimizer"), ()) for call in before]
    makers.append((spec.bind(last, _optimizers(), "optimizer", given=("learning_rate",)), (schedule,)))
    if last.args and ":" not in last.name:  # adam(1e-3) would set b1, not the learning rate
        raise UserError(
            f"optimizer={text!r}: name the arguments, as in {last.name}(...={last.args[0]!r}); "
            "the learning rate is the schedule's"
        )
    if rules.decay:
        if last.name in _ONE_STEP_SIZE:
            raise UserError(f"rules.decay: {last.name} finds one step size for all parameters together and cannot "
                            "decay them by different factors; use another optimizer, such as adamw")  # fmt: skip
        if not any(_bound(make, args)[1] for make, args in makers):
            raise UserError(f"rules.decay: optimizer={text!r} has no weight decay to multiply; use one that has, such "
                            "as adamw(weight_decay=1e-2), or add_decayed_weights(5e-4)|sgd(momentum=0.9)")  # fmt: skip
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    parts += [_with_decay(make, args, rules) for make, args in makers]
    if not isinstance(parts[-1], optax.GradientTransformation):
        kind = "a function, such as a schedule is" if callable(parts[-1]) else f"a {type(parts[-1]).__name__}"
        raise UserError(f"optimizer={text!r}: {last.name} gives {kind}, and not an optax.GradientTransformation; the "
                        "learning rate has a key of its own, schedule")  # fmt: skip
    if rules.lr:
        parts.append(_scale_by_name(rules))
    optimizer = parts[0] if len(parts) == 1 else optax.chain(*parts)
    if rules.frozen:
        labels = functools.partial(tree.map_named, lambda name, _: "frozen" if name in rules.frozen else "trained")
        optimizer = optax.partition({"trained": optimizer, "frozen": _keep()}, labels)
    return _checked(text, optimizer)


def _checked(text: str, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, under standard dtype promotion, with a UserError for what cannot run right, however wrapped."""

    def init(params: Any) -> Any:
        state = optimizer.init(params)
        for part in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, tuple(_UNFIT_STATES))):
            if reason := _UNFIT_STATES.get(type(part)):
                raise UserError(f"optimizer={text!r}: a transformation with the state {type(part).__name__} cannot be "
                                f"used, since {reason}")  # fmt: skip
        return state

    @promoting
    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        try:
            return optimizer.update(updates, state, params, **extra)
        except (TypeError, ValueError) as e:
            # optax's own words, of Python's and of its Hutchinson estimator's.
            wanted = re.search(r"missing \d+ required keyword-only arguments?: (.+)|(obj_fn) must be provided", str(e))
            if not wanted:
                raise
            raise UserError(f"optimizer={text!r}: a transformation needs {wanted[1] or wanted[2]} at each update, "
                            "which the train step does not give to optimizers")  from e  # fmt: skip

    return optax.GradientTransformationExtraArgs(init, update)


def _bound(make: functools.partial[Any], args: tuple[Any, ...]) -> tuple[inspect.BoundArguments, dict[str, float]]:
    """All arguments of a transform, defaults included, and by name those that are a weight decay above zero."""
    bound = inspect.signature(make.func).bind(*make.args, *args, **make.keywords)
    bound.apply_defaults()
    return bound, {name: value for name in _DECAYS if (value := bound.arguments.get(name))}


def _with_decay(make: functools.partial[Any], args: tuple[Any, ...], rules: Rules) -> optax.GradientTransformation:
    """The transform, with the weight decay of each parameter multiplied by its factor in the rules."""
    bound, decays = _bound(make, args)
    if not (rules.decay and decays):
        return make(*args)
    # One transform for each factor, applied to the parameters with this factor. optax's masks have no other factors
    # than 0 and 1.
    labels = {factor: f"decay{i}" for i, factor in enumerate(sorted({1.0, *rules.decay.values()}))}
    transforms = {}
    for factor, label in labels.items():
        bound.arguments.update({name: factor * value for name, value in decays.items()})
        transforms[label] = make.func(*bound.args, **bound.kwargs)
    return optax.partition(
        transforms, functools.partial(tree.map_named, lambda name, _: labels[rules.decay.get(name, 1.0)])
    )


def _scale_by_name(rules: Rules) -> optax.GradientTransformation:
    def scale(name: str, update: jax.Array) -> jax.Array:
        return update * rules.lr[name] if name in rules.lr else update

    return optax.stateless(lambda updates, params: tree.map_named(scale, updates))


def _keep() -> optax.GradientTransformation:
    """Updates that change no bit. They are -0.0, since x + -0.0 is x for each x, while -0.0 + 0.0 is 0.0."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates))


def seed_keys(state: Any, seed: jax.Array | int) -> Any:
    """An optimizer's first state, with the run's seed folded into each random key in it; seed is u32[].

    So optax's noise (`noisy_sgd`, `add_noise`) differs between seeds, and is the same when a run is repeated.
    """
    leaves, structure = jax.tree.flatten(state)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)]
    for number, i in enumerate(places):  # numbered, so that two transforms with one key draw different noise
        fold = jax.vmap(jax.random.fold_in, (0, None))
        leaves[i] = fold(fold(leaves[i].reshape(-1), number), seed).reshape(leaves[i].shape)
    return jax.tree.unflatten(structure, leaves)


def promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under JAX's standard dtype promotion, in strict mode too: optax relies on it (`b1 ** count`)."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapped

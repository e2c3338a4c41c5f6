"""Builds optax optimizers from specs, with gradient transforms before them and per-parameter rules."""

import functools
import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from imgclf_jax.core import spec, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Function, OptState, Params, PyTree, Value
from imgclf_jax.optim.rules import Rules
from imgclf_jax.optim.weight_averages import evaluated_by, with_evaluated

log = logging.getLogger(__name__)

# Optimizers of optax that cannot be used, and why.
_PER_EXAMPLE = "it needs per-example gradients, and the train step computes the gradient of the mean loss"
_SAM = ("each of its steps needs a second gradient, at perturbed weights; gradient='sam(rho=0.05)' takes it for every "
        "optimizer")  # fmt: skip
_GALORE = "its state has arrays of size zero, for parameters that it does not project, and checkpoints cannot hold them"
_LOOKAHEAD = "it needs two sets of parameters; end the optimizer's spec with |lookahead(k, alpha) instead"
UNFIT = {
    "differentially_private_aggregate": _PER_EXAMPLE,
    "dpsgd": _PER_EXAMPLE,
    "galore": _GALORE,
    "lookahead": _LOOKAHEAD,
    "sam": _SAM,
}

# The states that identify them inside other transforms.
_UNFIT_STATES = {
    optax.LookaheadState: _LOOKAHEAD,
    optax.contrib.DifferentiallyPrivateAggregateState: _PER_EXAMPLE,
    optax.contrib.GaLoreState: _GALORE,
    optax.contrib.SAMState: _SAM,
}
_SCHEDULE_FREE = ("it trains the parameters y but evaluates x, which follow from its state; return "
                  "imgclf_jax.optim.weight_averages.with_evaluated(optimizer, evaluated), where evaluated(opt_state, "
                  "params) returns x")  # fmt: skip

# Optimizers of optax whose learning rate must be a number; `inject_hyperparams` gives them the schedule.
_NUMBER_ONLY = ("optimistic_adam", "polyak_sgd", "rprop", "sm3")

_SCHEDULE_FREE_OPTIMIZERS = ("schedule_free_adamw", "schedule_free_sgd")

# These estimate one step size from all parameters, so they cannot decay parameters by different factors.
_ONE_STEP_SIZE = ("dadapt_adamw", "dog", "dowg", "momo", "momo_adam", "prodigy")

# These compute each update from iterates of their own, so what changes an update later is undone or amplified.
_OWN_ITERATES = ("cocob", "madgrad")

# Transforms allowed before the optimizer.
_TRANSFORMS = ("adaptive_grad_clip", "add_decayed_weights", "centralize", "clip", "clip_by_block_rms",
               "clip_by_global_norm", "normalize_by_update_norm", "zero_nans")  # fmt: skip
TRANSFORMS = {name: getattr(optax, name) for name in _TRANSFORMS}

# Extra arguments of an update that are functions of the parameters.
_FUNCTIONS = ("value_fn", "obj_fn", "grad_fn")

BuildInner = Callable[[str], optax.GradientTransformation]  # from a spec to its optimizer

# Transforms allowed after the optimizer, besides `lookahead`.
_AFTER = {"reduce_on_plateau": optax.contrib.reduce_on_plateau}

_NO_RULES = Rules()

# Names of the weight-decay argument in optax.
_DECAYS = ("weight_decay", "weight_decay_rate", "adam_weight_decay")


# The ranges of numeric arguments in optax, which takes any number: (whether a number is allowed, in words).
_BELOW_1 = (lambda x: 0 <= x < 1, "0 to below 1")
_NOT_NEGATIVE = (lambda x: x >= 0, "0 or more")
_POSITIVE = (lambda x: x > 0, "above 0")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(("b1", "b2", "b3", "decay", "momentum"), _BELOW_1),
    **dict.fromkeys(("eps", "eps_root", *_DECAYS), _NOT_NEGATIVE),
    **dict.fromkeys(("clipping", "max_delta", "max_norm", "threshold"), _POSITIVE),
}


def _muon_dimensions(params: Params) -> PyTree:
    """Muon's dimension numbers: the row and column axes of each kernel; None for parameters that Adam updates.

    Convolution kernels are flattened to [kh * kw * c, f]. Adam updates all other parameters and the head's kernel, as
    Muon's author recommends; he leaves the first convolution to Adam too, which Muon updates here.
    """

    def axes(name: str, x: jax.Array) -> PyTree:
        if not name.endswith("kernel") or name.startswith("head/") or x.ndim not in (2, 4):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return tree.map_named(axes, params)


def _noisy_sgd(
    learning_rate: optax.Schedule, eta: float = 0.01, gamma: float = 0.55, key: int = 0
) -> optax.GradientTransformation:
    """optax's `noisy_sgd` with a default key, without which it warns; `seed_keys` folds in the run's seed."""
    return optax.noisy_sgd(learning_rate, eta, gamma, key)


def _with_schedule(function: Callable[..., optax.GradientTransformation]) -> Function:
    """Makes an optimizer accept a schedule as its first argument, by `inject_hyperparams`."""
    _, *others = inspect.signature(function).parameters
    return optax.inject_hyperparams(function, others)


def _schedule_free(name: str) -> Function:
    """optax's `schedule_free_sgd` or `schedule_free_adamw`, evaluated at its averaged parameters x."""
    function = getattr(optax.contrib, name)

    @functools.wraps(function)
    def evaluating(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        if inspect.signature(function).bind(*args, **kwargs).arguments.get("warmup_steps"):
            raise UserError(f"optimizer: {name} takes no warmup_steps here; warm up in the schedule, as in "
                            "schedule=\"constant(1e-2, warmup='5%')\"")  # fmt: skip
        return with_evaluated(function(*args, **kwargs), optax.contrib.schedule_free_eval_params)

    return evaluating


def _schedule_free_around(
    build_inner: BuildInner, learning_rate: optax.Schedule, base_optimizer: str, b1: float = 0.9,
    weight_lr_power: float = 2.0,
) -> optax.GradientTransformation:  # fmt: skip
    wrapped = optax.contrib.schedule_free(build_inner(base_optimizer), learning_rate, b1, weight_lr_power)
    return with_evaluated(wrapped, optax.contrib.schedule_free_eval_params)


def _mechanize_around(
    build_inner: BuildInner, learning_rate: optax.Schedule, base_optimizer: str, weight_decay: float = 1e-2,
    eps: float = 1e-8, s_init: float = 1e-6, num_betas: int = 6,
) -> optax.GradientTransformation:  # fmt: skip
    return optax.contrib.mechanize(build_inner(base_optimizer), weight_decay, eps, s_init, num_betas)


# Wrappers of an inner optimizer, given as a spec. The learning rate and `rules` apply to the inner optimizer.
_AROUND = {"mechanize": _mechanize_around, "schedule_free": _schedule_free_around}


@functools.cache
def _optimizers() -> dict[str, object]:
    """All optimizers by name: every public function of optax and optax.contrib of a `learning_rate`, and wrappers."""
    out: dict[str, object] = {}
    for name, function in {**vars(optax), **vars(optax.contrib)}.items():
        if not callable(function) or isinstance(function, type):
            continue
        if spec.takes(function, "learning_rate") and name not in UNFIT and not name.startswith(("_", "scale_by_")):
            out[name] = function
    out |= {name: _with_schedule(getattr(optax, name)) for name in _NUMBER_ONLY}
    out |= {name: _schedule_free(name) for name in _SCHEDULE_FREE_OPTIMIZERS}
    out |= _AROUND
    out["noisy_sgd"] = _noisy_sgd
    out["muon"] = functools.partial(optax.contrib.muon, muon_weight_dimension_numbers=_muon_dimensions)
    return out


def split_lookahead(text: str) -> tuple[list[spec.Call], spec.Call | None]:
    """Splits an optimizer spec into its calls and the trailing `lookahead(…)`, or None.

    `lookahead` averages weights and does not transform the gradient: see `weight_averages`.
    """
    calls = spec.parse(text)
    return (calls[:-1], calls[-1]) if calls and calls[-1].name == "lookahead" else (calls, None)


def build(text: str, schedule: optax.Schedule, clip: float, rules: Rules = _NO_RULES) -> optax.GradientTransformation:
    """Builds an optimizer from a spec such as `add_decayed_weights(5e-4)|sgd(momentum=0.9)`.

    It chains clipping to the global norm `clip` (0: none), the transforms before the optimizer, the optimizer with the
    learning rate `schedule`, the learning-rate multipliers of `rules`, and `reduce_on_plateau`. Frozen parameters get
    no update and have no state. Pass its initial state through `seed_keys`. Raises UserError if the spec names no
    optimizer, its arguments do not fit, or `rules.decay` has no weight decay to multiply.
    """
    try:
        parts, decays = _transforms(text, schedule, rules)
    except ValueError as e:  # optax raises it for arguments out of range
        if isinstance(e, UserError) or spec.names_code(text):
            raise
        raise UserError(f"optimizer={text!r}: {e}") from e
    if rules.decay and not decays:
        raise UserError(f"rules.decay: optimizer={text!r} has no weight decay to multiply; use one that decays "
                        "weights, such as adamw(weight_decay=1e-2), or "
                        "add_decayed_weights(5e-4)|sgd(momentum=0.9)")  # fmt: skip
    optimizer = _chain([optax.clip_by_global_norm(clip), *parts] if clip else parts)
    if rules.frozen:
        transforms = {"trained": optimizer, "frozen": _freeze()}
        optimizer = _partition(transforms, lambda name: "frozen" if name in rules.frozen else "trained")
    return _with_checks(text, optimizer)


def _transforms(
    text: str, schedule: optax.Schedule, rules: Rules, wrapper: str = ""
) -> tuple[list[optax.GradientTransformation], bool]:
    """The transforms of a spec, inside a `wrapper` if any, in order, and whether one of them decays weights."""
    first, lookahead = split_lookahead(text)
    calls = [_without_module(call) for call in first]
    after = calls.pop() if calls and calls[-1].name in _AFTER else None
    if not calls or [call.name for call in calls[:-1] if call.name in _optimizers()]:
        raise UserError(f"optimizer={text!r}: expected exactly one optimizer; allowed before it are "
                        f"{', '.join(TRANSFORMS)}, and after it {', '.join(_AFTER)} and lookahead")  # fmt: skip
    *before, last = calls
    if last.name in UNFIT:
        raise UserError(f"optimizer={text!r}: {last.name} cannot be used, since {UNFIT[last.name]}")
    makers: list[Any] = [(spec.bind(call, TRANSFORMS, "transform before the optimizer"), ()) for call in before]
    decays = False

    def build_inner(inner: str) -> optax.GradientTransformation:
        nonlocal decays
        if not isinstance(inner, str) or split_lookahead(inner)[1]:
            raise UserError(f"optimizer={text!r}: {last.name} takes an optimizer's spec in quotes, without lookahead, "
                            f"as in {last.name}('sgd')")  # fmt: skip
        parts, decays = _transforms(inner, schedule, rules, last.name)
        if any(map(evaluated_by, parts)):
            raise UserError(f"optimizer={text!r}: {inner} evaluates other parameters than it trains, so {last.name} "
                            "cannot wrap it")  # fmt: skip
        return _chain(parts)

    around = last.name in _AROUND
    leading, args = (("learning_rate",), (schedule,)) if not around else (
        ("build_inner", "learning_rate"), (build_inner, schedule))  # fmt: skip
    optimizer = spec.bind(last, _optimizers(), "optimizer", leading=leading)
    if len(last.args) > around and ":" not in last.name:  # adam(1e-3) would set b1, not the learning rate
        raise UserError(
            f"optimizer={text!r}: name the arguments, as in {last.name}(...={last.args[-1]!r}); "
            "set the learning rate by the key schedule"
        )
    for call, make in zip(calls, [*(make for make, _ in makers), optimizer], strict=True):
        if ":" not in call.name:
            _check_ranges(text, make)
    if around:
        made = optimizer(*args)
    else:
        makers.append((optimizer, args))
    if rules.decay and last.name in _ONE_STEP_SIZE:
        raise UserError(f"rules.decay: {last.name} finds one step size for all parameters, so it cannot decay them by "
                        "different factors; use another optimizer, such as adamw")  # fmt: skip
    parts = [_with_decay(make, args, rules) for make, args in makers] + ([made] if around else [])
    if rules.decay and ":" in last.name and not around and _bound(*makers[-1])[1]:
        log.warning("rules.decay: %s is called once for each factor, with the parameters of that factor alone; if it "
                    "computes over all parameters, such as their norm, leave the weight decay to add_decayed_weights(…)"
                    "|%s", last.name, last.name)  # fmt: skip
    if not isinstance(parts[-1], optax.GradientTransformation):
        kind = "a function, such as a schedule" if callable(parts[-1]) else f"a {type(parts[-1]).__name__}"
        raise UserError(f"optimizer={text!r}: {last.name} returns {kind}, not an optax.GradientTransformation; set the "
                        "learning rate by the key schedule")  # fmt: skip
    scaled = "rules.lr and rules.layer_decay" if rules.lr and not around else str(after or "")
    if last.name in _OWN_ITERATES and (changed := scaled or wrapper or str(lookahead or "")):
        raise UserError(f"optimizer={text!r}: {last.name} tracks its own updates, which {changed} would change; use "
                        "another optimizer, such as adam")  # fmt: skip
    if scaled and (around or evaluated_by(parts[-1])):
        raise UserError(f"optimizer={text!r}: {last.name} tracks its own updates, which {scaled} would scale; scale "
                        "the updates of an inner optimizer instead, as in schedule_free('sgd') or "
                        "mechanize('adam|reduce_on_plateau')")  # fmt: skip
    parts += [_scale_by_name(rules)] if rules.lr and not around else []
    parts += [spec.bind(after, _AFTER, "transform after the optimizer")()] if after else []
    return parts, decays or any(_bound(make, args)[1] for make, args in makers)


def _check_ranges(text: str, make: functools.partial[Any]) -> None:
    given = inspect.signature(make.func).bind_partial(*make.args, **make.keywords).arguments
    for name, value in given.items():
        if name in _RANGES and isinstance(value, int | float) and not _RANGES[name][0](value):
            raise UserError(f"optimizer={text!r}: {name}={value} must be {_RANGES[name][1]}")


def _without_module(call: spec.Call) -> spec.Call:
    """Strips the module from the import path of an optax function that is replaced or refused here."""
    module, _, name = call.name.rpartition(":")
    special = name in (*UNFIT, *_AFTER, *_AROUND, *_NUMBER_ONLY, *_OWN_ITERATES, *_SCHEDULE_FREE_OPTIMIZERS)
    return replace(call, name=name) if special and module.split(".")[0] == "optax" else call


def _chain(parts: list[optax.GradientTransformation]) -> optax.GradientTransformation:
    """`optax.chain` that evaluates the same parameters as its last part."""
    if len(parts) == 1:
        return parts[0]
    chain, evaluated = optax.chain(*parts), evaluated_by(parts[-1])
    return with_evaluated(chain, lambda state, params: evaluated(state[-1], params)) if evaluated else chain


def _partition(
    transforms: dict[str, optax.GradientTransformation], label: Callable[[str], str]
) -> optax.GradientTransformation:
    """`optax.partition` by parameter path, for transforms that call the loss or its gradient too.

    A transform sees its own parameters and optax.MaskedNode for the rest, which are filled in for the loss.
    """
    labels = functools.partial(tree.map_named, lambda name, _: label(name))
    fit = {name: _unless_empty(transform) for name, transform in transforms.items()}
    partition = optax.partition(fit, labels, mask_compatible_extra_args=True)

    def update(updates: Params, state: OptState, params: Params = None, **extra: Any) -> tuple[Params, OptState]:
        def fill_in(function: Function, returns_gradients: bool = False) -> Function:
            @functools.wraps(function)  # optax reads the signature
            def wrapped(own: Any, *args: Any, **kwargs: Any) -> Any:
                out = function(_where_masked(own, params, own), *args, **kwargs)
                return _where_masked(own, own, out) if returns_gradients else out

            return wrapped

        functions = {name: fill_in(extra[name], name == "grad_fn") for name in _FUNCTIONS if name in extra}
        return partition.update(updates, state, params, **{**extra, **functions})

    def evaluated(state: OptState, params: Params) -> PyTree:
        names, out = labels(params), params
        for name, transform in transforms.items():
            if inner_evaluated := evaluated_by(transform):
                own = jax.tree.map(lambda n, p, name=name: p if n == name else optax.MaskedNode(), names, params)
                new = inner_evaluated(state.inner_states[name].inner_state, own)
                out = _where_masked(new, out, new)
        return out

    optimizer = optax.GradientTransformationExtraArgs(partition.init, update)
    return with_evaluated(optimizer, evaluated) if any(map(evaluated_by, transforms.values())) else optimizer


def _unless_empty(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transform that does nothing where it has no parameters, which some cannot compute."""
    extended = optax.with_extra_args_support(transform)

    def update(updates: Params, state: OptState, params: Params = None, **extra: Any) -> tuple[Params, OptState]:
        return extended.update(updates, state, params, **extra) if jax.tree.leaves(updates) else (updates, state)

    return optax.GradientTransformationExtraArgs(extended.init, update)


def _where_masked(like: PyTree, masked: PyTree, unmasked: PyTree) -> PyTree:
    """Leaves of `masked` where `like` has an optax.MaskedNode, and of `unmasked` elsewhere."""
    tree_map = functools.partial(jax.tree.map, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return tree_map(lambda x, a, b: a if isinstance(x, optax.MaskedNode) else b, like, masked, unmasked)


def _with_checks(text: str, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs an optimizer under standard dtype promotion; UserError if a nested transform cannot be used."""
    evaluated, extended = evaluated_by(optimizer), optax.with_extra_args_support(optimizer)
    unfit = _UNFIT_STATES if evaluated else {**_UNFIT_STATES, optax.contrib.ScheduleFreeState: _SCHEDULE_FREE}

    @promoting
    def init(params: Params) -> PyTree:
        def checked(part: Any) -> Any:
            if reason := unfit.get(type(part)):
                raise UserError(f"optimizer={text!r}: a transformation with the state {type(part).__name__} cannot be "
                                f"used, since {reason}")  # fmt: skip
            if isinstance(part, optax.contrib.HutchinsonState) and part.key.dtype == jnp.uint32:
                return optax.contrib.HutchinsonState(jax.random.wrap_key_data(part.key))  # for `seed_keys`
            if getattr(part, "weak_type", False):  # later states are not weakly typed
                return jax.lax.convert_element_type(part, part.dtype)
            return part

        kinds = (*unfit, optax.contrib.HutchinsonState)
        return jax.tree.map(checked, optimizer.init(params), is_leaf=lambda x: isinstance(x, kinds))

    @promoting
    def update(updates: Params, state: OptState, params: Params = None, **extra: Any) -> tuple[Params, OptState]:
        try:
            return extended.update(updates, state, params, **extra)
        except TypeError as e:
            missing = re.search(r"missing \d+ required keyword-only arguments?: (.+)", str(e))  # Python's wording
            if not missing:
                raise
            raise UserError(f"optimizer={text!r}: a transformation needs {missing[1]} at each update, which the train "
                            "step does not pass to optimizers")  from e  # fmt: skip

    out = optax.GradientTransformationExtraArgs(init, update)
    return with_evaluated(out, promoting(evaluated)) if evaluated else out


def _bound(make: functools.partial[Any], args: tuple[Value, ...]) -> tuple[inspect.BoundArguments, dict[str, float]]:
    """Returns all arguments of a transform, defaults included, and its nonzero weight decays by argument name."""
    bound = inspect.signature(make.func).bind(*make.args, *args, **make.keywords)
    bound.apply_defaults()
    return bound, {name: value for name in _DECAYS if (value := bound.arguments.get(name))}


def _with_decay(make: functools.partial[Any], args: tuple[Value, ...], rules: Rules) -> optax.GradientTransformation:
    """Builds a transform whose weight decay is multiplied by each parameter's factor in `rules.decay`."""
    bound, decays = _bound(make, args)
    if not (rules.decay and decays):
        return make(*args)
    # One transform per distinct factor, each for its own parameters: optax's masks only know 0 and 1.
    labels = {factor: f"decay{i}" for i, factor in enumerate(sorted({1.0, *rules.decay.values()}))}
    transforms = {}
    for factor, label in labels.items():
        bound.arguments.update({name: factor * value for name, value in decays.items()})
        transforms[label] = make.func(*bound.args, **bound.kwargs)
    return _partition(transforms, lambda name: labels[rules.decay.get(name, 1.0)])


def _scale_by_name(rules: Rules) -> optax.GradientTransformation:
    def scale(name: str, update: jax.Array) -> jax.Array:
        return update * rules.lr[name] if name in rules.lr else update

    return optax.stateless(lambda updates, params: tree.map_named(scale, updates))


def _freeze() -> optax.GradientTransformation:
    """Updates of -0.0, which change no bit: x + -0.0 is x for every x, while -0.0 + 0.0 is 0.0."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates))


def seed_keys(state: OptState, seed: jax.Array | int) -> OptState:
    """Folds the run's seed, u32[], into each random key of an optimizer's initial state.

    So optax's noise (`noisy_sgd`, `add_noise`) differs between seeds and repeats with the same seed.
    """
    leaves, structure = jax.tree.flatten(state)
    keys = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)]
    for number, i in enumerate(keys):  # numbered, so that two transforms with equal keys draw different noise
        fold = jax.vmap(jax.random.fold_in, (0, None))
        leaves[i] = fold(fold(leaves[i].reshape(-1), number), seed).reshape(leaves[i].shape)
    return jax.tree.unflatten(structure, leaves)


def promoting(function: Function) -> Function:
    """Runs `function` under JAX's standard dtype promotion, on which optax relies (`b1 ** count`)."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapped

"""Optimizers: optax's, by optax's own names, with other transforms of the gradient before them."""

import functools
import inspect
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
from imgclf_jax.optim.rules import Rules
from imgclf_jax.optim.weight_averages import evaluated_by, with_evaluated

# What of optax cannot run here, and why.
_BY_EXAMPLE = "it needs the gradient of each example, and the train step computes that of their mean"
_SAM = ("each of its steps needs a second gradient, at perturbed weights; gradient='sam(rho=0.05)' takes it for every "
        "optimizer")  # fmt: skip
_GALORE = "its state has arrays of size zero, for parameters that it does not project, and no checkpoint holds these"
_LOOKAHEAD = "it wants two sets of parameters; end the optimizer's spec with |lookahead(k, alpha) instead"
UNFIT = {
    "differentially_private_aggregate": _BY_EXAMPLE,
    "dpsgd": _BY_EXAMPLE,
    "galore": _GALORE,
    "lookahead": _LOOKAHEAD,
    "sam": _SAM,
}

# What it is known by inside of other transformations: its state.
_UNFIT_STATES = {
    optax.LookaheadState: _LOOKAHEAD,
    optax.contrib.DifferentiallyPrivateAggregateState: _BY_EXAMPLE,
    optax.contrib.GaLoreState: _GALORE,
    optax.contrib.SAMState: _SAM,
}
_SCHEDULE_FREE = ("it trains the parameters y, and those to evaluate, x, follow from its state; return "
                  "imgclf_jax.optim.weight_averages.with_evaluated(optimizer, evaluated), where evaluated(opt_state, "
                  "params) gives x")  # fmt: skip

# The optimizers of optax.contrib that take a schedule as it is.
_CONTRIB = ("acprop", "ademamix", "adopt", "cocob", "dadapt_adamw", "dog", "dowg", "madgrad", "momo", "momo_adam",
            "prodigy", "simplified_ademamix", "sophia")  # fmt: skip

# Those whose first argument, the learning rate, is a number in optax.
_OF_A_NUMBER = ("optimistic_adam", "polyak_sgd", "rprop", "sm3")

_SCHEDULE_FREE_ALONE = ("schedule_free_adamw", "schedule_free_sgd")

# These estimate one step size from all parameters together. A weight decay for each parameter would need several.
_ONE_STEP_SIZE = ("dadapt_adamw", "dog", "dowg", "momo", "momo_adam", "prodigy")

# What may stand before the optimizer.
_TRANSFORMS = ("adaptive_grad_clip", "add_decayed_weights", "centralize", "clip", "clip_by_block_rms",
               "clip_by_global_norm", "normalize_by_update_norm", "zero_nans")  # fmt: skip
TRANSFORMS = {name: getattr(optax, name) for name in _TRANSFORMS}

# The extra arguments that are functions of the parameters.
_FUNCTIONS = ("value_fn", "obj_fn", "grad_fn")

Inside = Callable[[str], optax.GradientTransformation]  # from a spec to its optimizer

# What may stand after the optimizer, but for `lookahead`.
_AFTER = {"reduce_on_plateau": optax.contrib.reduce_on_plateau}

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


def _with_schedule(function: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    """An optimizer of optax whose first parameter may be a schedule: its value at the step is passed on."""
    _, *others = inspect.signature(function).parameters
    return optax.inject_hyperparams(function, others)


def _schedule_free(name: str) -> Callable[..., Any]:
    """optax's `schedule_free_sgd` or `schedule_free_adamw`, with the parameters x to evaluate."""
    function = getattr(optax.contrib, name)

    @functools.wraps(function)
    def evaluating(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        if inspect.signature(function).bind(*args, **kwargs).arguments.get("warmup_steps"):
            raise UserError(f"{name} takes no warmup_steps here; the schedule warms up, as in "
                            "schedule=\"constant(1e-2, warmup='5%')\"")  # fmt: skip
        return with_evaluated(function(*args, **kwargs), optax.contrib.schedule_free_eval_params)

    return evaluating


def _schedule_free_around(
    inside: Inside, learning_rate: optax.Schedule, base_optimizer: str, b1: float = 0.9, weight_lr_power: float = 2.0
) -> optax.GradientTransformation:
    around = optax.contrib.schedule_free(inside(base_optimizer), learning_rate, b1, weight_lr_power)
    return with_evaluated(around, optax.contrib.schedule_free_eval_params)


def _mechanize_around(
    inside: Inside, learning_rate: optax.Schedule, base_optimizer: str, weight_decay: float = 1e-2, eps: float = 1e-8,
    s_init: float = 1e-6, num_betas: int = 6,
) -> optax.GradientTransformation:  # fmt: skip
    return optax.contrib.mechanize(inside(base_optimizer), weight_decay, eps, s_init, num_betas)


# Those around an optimizer, which they name by its spec. It is inside that the learning rate and `rules` count.
_AROUND = {"mechanize": _mechanize_around, "schedule_free": _schedule_free_around}


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
    out |= {name: _with_schedule(getattr(optax, name)) for name in _OF_A_NUMBER}
    out |= {name: _schedule_free(name) for name in _SCHEDULE_FREE_ALONE}
    out |= _AROUND
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
    the optimizer with the learning rate `schedule`, the learning rates of `rules`, and `reduce_on_plateau`. Frozen
    parameters get no update and have no state. Its first state still needs `seed_keys`. Raises UserError for a spec
    that names no optimizer, has arguments that do not fit, or has no weight decay that `rules.decay` could multiply.
    """
    try:
        parts, decays = _parts(text, schedule, rules)
    except ValueError as e:  # optax's own for an argument out of its range
        if isinstance(e, UserError) or spec.names_code(text):
            raise
        raise UserError(f"optimizer={text!r}: {e}") from e
    if rules.decay and not decays:
        raise UserError(f"rules.decay: optimizer={text!r} has no weight decay to multiply; use one that has, such "
                        "as adamw(weight_decay=1e-2), or add_decayed_weights(5e-4)|sgd(momentum=0.9)")  # fmt: skip
    optimizer = _chain([optax.clip_by_global_norm(clip), *parts] if clip else parts)
    if rules.frozen:
        transforms = {"trained": optimizer, "frozen": _keep()}
        optimizer = _partition(transforms, lambda name: "frozen" if name in rules.frozen else "trained")
    return _checked(text, optimizer)


def _parts(text: str, schedule: optax.Schedule, rules: Rules) -> tuple[list[optax.GradientTransformation], bool]:
    """The transforms that a spec names, and whether one of them decays weights."""
    calls = [_by_name(call) for call in split_lookahead(text)[0]]
    after = calls.pop() if calls and calls[-1].name in _AFTER else None
    if not calls or [call.name for call in calls[:-1] if call.name in _optimizers()]:
        raise UserError(f"optimizer={text!r}: expected exactly one optimizer; before it may stand "
                        f"{', '.join(TRANSFORMS)}, after it {', '.join(_AFTER)} and lookahead")  # fmt: skip
    *before, last = calls
    if last.name in UNFIT:
        raise UserError(f"optimizer={text!r}: {last.name} cannot be used, since {UNFIT[last.name]}")
    makers: list[Any] = [(spec.bind(call, TRANSFORMS, "transform before the optimizer"), ()) for call in before]
    decays = False

    def inside(inner: str) -> optax.GradientTransformation:
        nonlocal decays
        if not isinstance(inner, str) or split_lookahead(inner)[1]:
            raise UserError(f"optimizer={text!r}: {last.name} takes an optimizer's spec in quotes, without lookahead, "
                            f"as in {last.name}('sgd')")  # fmt: skip
        parts, decays = _parts(inner, schedule, rules)
        if any(map(evaluated_by, parts)):
            raise UserError(f"optimizer={text!r}: {inner} evaluates other parameters than it trains, so it cannot be "
                            f"inside of {last.name}")  # fmt: skip
        return _chain(parts)

    around = last.name in _AROUND
    given, args = (("inside", "learning_rate"), (inside, schedule)) if around else (("learning_rate",), (schedule,))
    optimizer = spec.bind(last, _optimizers(), "optimizer", given=given)
    if len(last.args) > around and ":" not in last.name:  # adam(1e-3) would set b1, not the learning rate
        raise UserError(
            f"optimizer={text!r}: name the arguments, as in {last.name}(...={last.args[-1]!r}); "
            "the learning rate is the schedule's"
        )
    if around:
        made = optimizer(*args)
    else:
        makers.append((optimizer, args))
    if rules.decay and last.name in _ONE_STEP_SIZE:
        raise UserError(f"rules.decay: {last.name} finds one step size for all parameters together and cannot "
                        "decay them by different factors; use another optimizer, such as adamw")  # fmt: skip
    parts = [_with_decay(make, args, rules) for make, args in makers] + ([made] if around else [])
    if not isinstance(parts[-1], optax.GradientTransformation):
        kind = "a function, such as a schedule is" if callable(parts[-1]) else f"a {type(parts[-1]).__name__}"
        raise UserError(f"optimizer={text!r}: {last.name} gives {kind}, and not an optax.GradientTransformation; the "
                        "learning rate has a key of its own, schedule")  # fmt: skip
    scaled = "rules.lr and rules.layer_decay" if rules.lr and not around else str(after or "")
    if scaled and (around or evaluated_by(parts[-1])):
        raise UserError(f"optimizer={text!r}: {last.name} reckons with its own updates, which {scaled} would scale; "
                        "let it scale those of an optimizer inside, as in schedule_free('sgd') or "
                        "mechanize('adam|reduce_on_plateau')")  # fmt: skip
    parts += [_scale_by_name(rules)] if rules.lr and not around else []
    parts += [spec.bind(after, _AFTER, "transform after the optimizer")()] if after else []
    return parts, decays or any(_bound(make, args)[1] for make, args in makers)


def _by_name(call: spec.Call) -> spec.Call:
    """The call, with the name alone of what is optax's and is treated in another way here than optax's functions."""
    module, _, name = call.name.rpartition(":")
    special = name in (*UNFIT, *_AFTER, *_AROUND, *_OF_A_NUMBER, *_SCHEDULE_FREE_ALONE)
    return replace(call, name=name) if special and module.split(".")[0] == "optax" else call


def _chain(parts: list[optax.GradientTransformation]) -> optax.GradientTransformation:
    """optax's chain, which evaluates what its last part does."""
    if len(parts) == 1:
        return parts[0]
    chain, evaluated = optax.chain(*parts), evaluated_by(parts[-1])
    return with_evaluated(chain, lambda state, params: evaluated(state[-1], params)) if evaluated else chain


def _partition(
    transforms: dict[str, optax.GradientTransformation], label: Callable[[str], str]
) -> optax.GradientTransformation:
    """optax's partition by labels of the parameters' paths, for transforms that call the loss or its gradient too.

    Each transform has its own parameters, and optax.MaskedNode for the others, which the loss takes as they are.
    """
    labels = functools.partial(tree.map_named, lambda name, _: label(name))
    partition = optax.partition(transforms, labels, mask_compatible_extra_args=True)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        def of_own(function: Callable[..., Any], returns_gradients: bool = False) -> Callable[..., Any]:
            @functools.wraps(function)  # optax reads the signature
            def wrapped(own: Any, *args: Any, **kwargs: Any) -> Any:
                out = function(_where_masked(own, params, own), *args, **kwargs)
                return _where_masked(own, own, out) if returns_gradients else out

            return wrapped

        functions = {name: of_own(extra[name], name == "grad_fn") for name in _FUNCTIONS if name in extra}
        return partition.update(updates, state, params, **{**extra, **functions})

    def evaluated(state: Any, params: Any) -> Any:
        names, out = labels(params), params
        for name, transform in transforms.items():
            if of_transform := evaluated_by(transform):
                own = jax.tree.map(lambda n, p, name=name: p if n == name else optax.MaskedNode(), names, params)
                new = of_transform(state.inner_states[name].inner_state, own)
                out = _where_masked(new, out, new)
        return out

    whole = optax.GradientTransformationExtraArgs(partition.init, update)
    return with_evaluated(whole, evaluated) if any(map(evaluated_by, transforms.values())) else whole


def _where_masked(own: Any, there: Any, elsewhere: Any) -> Any:
    """The leaves of `there` where `own` has an optax.MaskedNode, and of `elsewhere` where it has not."""
    masked = functools.partial(jax.tree.map, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return masked(lambda x, a, b: a if isinstance(x, optax.MaskedNode) else b, own, there, elsewhere)


def _checked(text: str, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, under standard dtype promotion, with a UserError for what cannot run right, however wrapped."""
    evaluated = evaluated_by(optimizer)
    unfit = _UNFIT_STATES if evaluated else {**_UNFIT_STATES, optax.contrib.ScheduleFreeState: _SCHEDULE_FREE}

    @promoting
    def init(params: Any) -> Any:
        def checked(part: Any) -> Any:
            if reason := unfit.get(type(part)):
                raise UserError(f"optimizer={text!r}: a transformation with the state {type(part).__name__} cannot be "
                                f"used, since {reason}")  # fmt: skip
            if isinstance(part, optax.contrib.HutchinsonState) and part.key.dtype == jnp.uint32:
                return optax.contrib.HutchinsonState(jax.random.wrap_key_data(part.key))  # for `seed_keys`
            if getattr(part, "weak_type", False):  # which no later state is
                return jax.lax.convert_element_type(part, part.dtype)
            return part

        kinds = (*unfit, optax.contrib.HutchinsonState)
        return jax.tree.map(checked, optimizer.init(params), is_leaf=lambda x: isinstance(x, kinds))

    @promoting
    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        try:
            return optimizer.update(updates, state, params, **extra)
        except TypeError as e:
            wanted = re.search(r"missing \d+ required keyword-only arguments?: (.+)", str(e))  # Python's own words
            if not wanted:
                raise
            raise UserError(f"optimizer={text!r}: a transformation needs {wanted[1]} at each update, which the train "
                            "step does not give to optimizers")  from e  # fmt: skip

    out = optax.GradientTransformationExtraArgs(init, update)
    return with_evaluated(out, promoting(evaluated)) if evaluated else out


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
    return _partition(transforms, lambda name: labels[rules.decay.get(name, 1.0)])


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

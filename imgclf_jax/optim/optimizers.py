"""Builds optax optimizers from specs, with gradient transforms before them and per-parameter rules."""

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from imgclf_jax.core import spec, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Function, Params
from imgclf_jax.optim import muon
from imgclf_jax.optim.rules import Rules
from imgclf_jax.optim.weight_averages import evaluated_by, with_evaluated


def _schedule_free(make: Callable[..., optax.GradientTransformation]) -> Function:
    """An optimizer of optax.contrib that is evaluated at its averaged parameters x."""
    evaluated = optax.contrib.schedule_free_eval_params
    return functools.wraps(make)(lambda *args, **kwargs: with_evaluated(make(*args, **kwargs), evaluated))


_NAMES = ("adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "lamb", "lars", "lion", "nadamw",
          "rmsprop", "sgd")  # fmt: skip
OPTIMIZERS: dict[str, Function] = {name: getattr(optax, name) for name in _NAMES} | {
    "muon": muon.muon,
    "muon_sgd": muon.muon_sgd,
    "schedule_free_adamw": _schedule_free(optax.contrib.schedule_free_adamw),
    "schedule_free_sgd": _schedule_free(optax.contrib.schedule_free_sgd),
}  # any other by its import path, such as `optax.contrib:prodigy`

_TRANSFORMS = ("adaptive_grad_clip", "add_decayed_weights", "centralize", "clip", "clip_by_block_rms",
               "clip_by_global_norm")  # fmt: skip
TRANSFORMS: dict[str, Function] = {name: getattr(optax, name) for name in _TRANSFORMS}  # before the optimizer

_DECAYS = ("weight_decay", "weight_decay_rate", "adam_weight_decay")  # the weight decay's names in optax
_NEEDED = {  # optax ignores these arguments without one of those
    **dict.fromkeys(("nesterov", "accumulator_dtype", "dtype_momentum"), ("momentum",)),
    **dict.fromkeys(("mask", "weight_decay_mask"), _DECAYS),
}
_NO_RULES = Rules()

promoting: Callable[[Function], Function] = jax.numpy_dtype_promotion("standard")  # optax needs it for `b1 ** count`


def split_lookahead(text: str) -> tuple[list[spec.Call], spec.Call | None]:
    """Splits an optimizer spec into its calls and the trailing `lookahead(…)`, which averages weights, or None."""
    calls = spec.parse(text)
    return (calls[:-1], calls[-1]) if calls and calls[-1].name == "lookahead" else (calls, None)


def build(text: str, schedule: optax.Schedule, clip: float, rules: Rules = _NO_RULES) -> optax.GradientTransformation:
    """Builds an optimizer from a spec such as `add_decayed_weights(5e-4)|sgd(momentum=0.9)`.

    It chains clipping to the global norm `clip` (0: none), the transforms before the optimizer, the optimizer with the
    learning rate `schedule`, and the learning-rate multipliers of `rules`. Frozen parameters get no update and have no
    state. Raises UserError if the spec names no optimizer, its arguments do not fit, or the rules do not.
    """
    calls, _ = split_lookahead(text)
    if not calls or any(call.name in OPTIMIZERS for call in calls[:-1]):
        raise UserError(f"optimizer={text!r}: expected exactly one optimizer; allowed before it are "
                        f"{', '.join(TRANSFORMS)}, after it lookahead")  # fmt: skip
    *before, last = calls
    makers = [spec.bind(call, TRANSFORMS, "transform before the optimizer") for call in before]
    optimizer = spec.bind(last, OPTIMIZERS, "optimizer", leading=("learning_rate",))
    optax_takes_rate = last.name.startswith("optax") and spec.takes(optimizer.func, "learning_rate")
    if last.args and (last.name in OPTIMIZERS or optax_takes_rate):  # adam(1e-3) would set b1
        raise UserError(f"optimizer={text!r}: name the arguments, as in {last.name}(...={last.args[-1]!r}); "
                        "set the learning rate by the key schedule")  # fmt: skip
    makers.append(functools.partial(optimizer, schedule))
    decays: list[dict[str, float]] = []  # the nonzero ones of each transform by argument name, defaults included
    for maker, call in zip(makers, calls, strict=True):
        bound = _bound(maker).arguments
        decays.append({name: bound[name] for name in _DECAYS if bound.get(name)})
        for name in call.kwargs:
            needed = [other for other in _NEEDED.get(name, ()) if other in bound]
            if needed and ":" not in call.name and not any(bound[other] or other in call.kwargs for other in needed):
                raise UserError(f"optimizer={text!r}: {name} has no effect in {call.name} without {needed[0]}")
    if rules.decay and not any(decays):
        raise UserError(f"rules.decay: optimizer={text!r} has no weight decay to multiply; use one that has, such as "
                        "adamw(weight_decay=1e-2) or add_decayed_weights(5e-4)|sgd")  # fmt: skip
    try:
        parts = [_with_decay(maker, own, rules) for maker, own in zip(makers, decays, strict=True)]
    except (TypeError, ValueError) as e:  # optax raises them for unfit arguments
        raise UserError(f"optimizer={text!r}: {e}") from e
    if not hasattr(parts[-1], "update"):
        raise UserError(f"optimizer={text!r} returns {parts[-1]!r:.80}; return an optax.GradientTransformation")
    evaluated = evaluated_by(parts[-1])
    if rules and evaluated:
        raise UserError(f"optimizer={text!r}: {last.name} takes neither rules nor frozen parameters; use another")
    scale = lambda name, update: update * rules.lr[name] if name in rules.lr else update  # noqa: E731
    scaled = optax.stateless(lambda updates, params: tree.map_named(scale, updates))
    chain = [optax.clip_by_global_norm(clip)] * bool(clip) + parts + [scaled] * bool(rules.lr)
    out = chain[0] if len(chain) == 1 else optax.chain(*chain)
    if rules.frozen:
        # x + -0.0 is x to the bit for every x, while -0.0 + 0.0 is 0.0.
        keep = optax.stateless(lambda updates, params: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates))
        groups = {"trained": out, "frozen": keep}
        out = _by_group(groups, lambda name: "frozen" if name in rules.frozen else "trained")
    extended = optax.with_extra_args_support(out)
    init = lambda params: jax.tree.map(_strongly_typed, extended.init(params))  # noqa: E731
    out = optax.GradientTransformationExtraArgs(promoting(init), promoting(extended.update))
    if evaluated:
        last_state = (lambda state: state) if len(chain) == 1 else operator.itemgetter(-1)
        return with_evaluated(out, promoting(lambda state, params: evaluated(last_state(state), params)))
    return out


def ignores_learning_rate(text: str, params: Params) -> bool:
    """Whether an optimizer updates `params`, arrays or their shapes, alike by two learning rates."""

    def program(rate: float) -> str:
        optimizer: Any = build(text, optax.constant_schedule(rate), 0.0)
        return str(jax.make_jaxpr(lambda p: optimizer.update(p, optimizer.init(p), p, value=0.0))(params))

    return program(0.5) == program(0.25)


def _strongly_typed(x: Any) -> Any:
    return jax.lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x  # as in later steps


def _bound(maker: functools.partial[Any]) -> inspect.BoundArguments:
    bound = inspect.signature(maker.func).bind(*maker.args, **maker.keywords)
    bound.apply_defaults()
    return bound


def _with_decay(
    maker: functools.partial[Any], decays: Mapping[str, float], rules: Rules
) -> optax.GradientTransformation:
    """Builds a transform whose weight decay is multiplied by each parameter's factor in `rules.decay`.

    It is one transform per factor, each for its own parameters: optax's masks only know 0 and 1.
    """
    if not (rules.decay and decays):
        return maker()
    factors = sorted({1.0, *rules.decay.values()})
    transforms, bound = {}, _bound(maker)
    for factor in factors:
        bound.arguments.update({name: factor * value for name, value in decays.items()})
        transforms[str(factor)] = maker.func(*bound.args, **bound.kwargs)
    return _by_group(transforms, lambda name: str(rules.decay.get(name, 1.0)))


def _by_group(
    transforms: Mapping[str, optax.GradientTransformation], group: Callable[[str], str]
) -> optax.GradientTransformation:
    """`optax.partition` by `group(path)`, which names the transform of a parameter."""
    return optax.partition(transforms, lambda params: tree.map_named(lambda name, x: group(name), params))

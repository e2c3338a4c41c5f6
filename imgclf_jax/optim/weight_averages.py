"""Weight averages: the weights that evaluation and prediction use instead of the trained ones.

An average covers all variables of a model, parameters and batch statistics. Optimizers may define the parameters to
evaluate themselves; see `with_evaluated`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import ModelState, OptState, Params, PyTree

type ParamsAndState = tuple[Params, ModelState]
type Averages = Any  # the state of an Average
type Updated = tuple[ParamsAndState, Averages]


class Average(NamedTuple):
    """A weight average as two pure functions.

    - `init(variables) -> average`.
    - `update(average, variables, step, opt_state) -> (variables, average)` runs after the optimizer's update number
      `step` i32[], counted from 0 and without skipped steps. The next step trains on the variables that it returns.
    """

    init: Callable[[ParamsAndState], Averages]
    update: Callable[..., Updated]


_COPY = functools.partial(jax.tree.map, jnp.copy)
NONE = Average(lambda variables: None, lambda average, variables, step, opt_state=None: (variables, None))

type Evaluated = Callable[[OptState, Params], Params]  # (opt_state, params) → params, see `with_evaluated`


class EvaluatingOptimizer(optax.GradientTransformationExtraArgs):
    """An optimizer with a function `evaluated`; see `with_evaluated`."""

    evaluated: Evaluated


def with_evaluated(optimizer: optax.GradientTransformation, evaluated: Evaluated) -> EvaluatingOptimizer:
    """Attaches to an optimizer the parameters to evaluate, as a function of its state and the trained parameters.

    After each step `evaluated(opt_state, params)` returns the parameters for evaluation, prediction and export, like
    `optax.contrib.schedule_free_eval_params`. It must be pure. Before the first step the trained ones are evaluated.
    """
    out = EvaluatingOptimizer(*optax.with_extra_args_support(optimizer))
    out.evaluated = evaluated
    return out


def evaluated_by(optimizer: optax.GradientTransformation) -> Evaluated | None:
    """The function attached by `with_evaluated`, or None if the trained parameters are evaluated."""
    return getattr(optimizer, "evaluated", None)


def ema(decay: float) -> Average:
    """Exponential moving average: a ← d a + (1 - d) v with d = min(decay, (1 + step) / (10 + step)).

    The smaller d of the first steps forgets the initial weights, as TensorFlow's average with `num_updates=step` does.
    """

    def update(average: Averages, variables: ParamsAndState, step: jax.Array, opt_state: OptState = None) -> Updated:
        t = step.astype(jnp.float32)
        weight = 1 - jnp.minimum(jnp.float32(decay), (1 + t) / (10 + t))
        return variables, _interpolate(average, variables, weight)

    return Average(_COPY, update)


def lookahead(total: int, k: int = 5, alpha: float = 0.5, power: float = 0.0) -> Average:
    """Lookahead (Zhang et al. 2019, arXiv:1907.08610): every `k` steps s ← s + alpha (v - s), v ← s.

    s are the slow weights, v the trained ones; the optimizer state is kept when v is reset. If `power` is above 0,
    1 - (1 - alpha) (steps done / total)**power replaces alpha, falling from 1 to `alpha`. airbench94, whose decay is
    0.95 per step, has lookahead(5, 0.226219, power=3), since 1 - 0.95**5 = 0.226219.
    """
    if type(k) is not int or k < 1 or not 0 < alpha <= 1 or power < 0:
        raise UserError(f"lookahead(k={k!r}, alpha={alpha}, power={power}): k must be an integer of 1 or more, "
                        "alpha above 0 and at most 1, power 0 or more")  # fmt: skip

    def update(slow: Averages, fast: ParamsAndState, step: jax.Array, opt_state: OptState = None) -> Updated:
        done = step + 1
        is_due = done % k == 0
        weight = 1 - (1 - alpha) * (done.astype(jnp.float32) / total) ** power
        slow = optax.tree.where(is_due, _interpolate(slow, fast, weight), slow)
        return optax.tree.where(is_due, slow, fast), slow

    return Average(_COPY, update)


def build(
    decay: float, call: spec.Call | None, total: int, optimizer: optax.GradientTransformation | None = None
) -> Average:
    """The average of the key `ema` (`decay`, 0 for none), of a `lookahead(…)`, or of an optimizer with `evaluated`.

    Raises UserError if more than one is set.
    """
    evaluated = optimizer and evaluated_by(optimizer)
    chosen = {f"ema={decay}": decay, str(call): call, "the optimizer": evaluated}
    if len(names := [name for name, value in chosen.items() if value]) > 1:
        raise UserError(f"{' and '.join(names)} both choose the weights to evaluate; remove one")
    if evaluated:  # of the parameters; the batch statistics are the trained model's
        return Average(_COPY, lambda _, trained, step, state: (trained, (evaluated(state, trained[0]), trained[1])))
    if call:
        return spec.bind(call, {"lookahead": lookahead}, "optimizer", leading=("total",))(total)
    return ema(decay) if decay else NONE


def _interpolate(old: PyTree, new: PyTree, weight: jax.Array) -> PyTree:
    """old + weight * (new - old), which keeps equal values bit for bit; integers take the new value."""

    def interpolate(a: jax.Array, b: jax.Array) -> jax.Array:
        return a + weight.astype(a.dtype) * (b - a) if jnp.issubdtype(a.dtype, jnp.inexact) else b

    return jax.tree.map(interpolate, old, new)

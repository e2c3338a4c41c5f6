"""The weights that evaluation and prediction use, where they are others than those that are trained.

An average over the steps of training is of all variables of a model: its parameters and its batch statistics. An
optimizer may itself say which parameters are to be evaluated; see `with_evaluated`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError

Variables = Any  # a pytree


class Average(NamedTuple):
    """`init(variables) -> average`, and `update(average, variables, step, opt_state) -> (variables, average)`.

    The `variables` and `opt_state` given to `update` are those after the optimizer's update of `step`, i32[], which
    starts from 0. The next step trains on the `variables` that it returns.
    """

    init: Callable[[Variables], Any]
    update: Callable[..., tuple[Variables, Any]]


NONE = Average(lambda variables: None, lambda average, variables, step, opt_state=None: (variables, None))

# `evaluated(opt_state, params) -> params`, see `with_evaluated`.
Evaluated = Callable[[Any, Any], Any]


class EvaluatingOptimizer(optax.GradientTransformationExtraArgs):
    """An optimizer with a function `evaluated`, see `with_evaluated`."""

    evaluated: Evaluated


def with_evaluated(optimizer: optax.GradientTransformation, evaluated: Evaluated) -> EvaluatingOptimizer:
    """The optimizer, with the parameters to evaluate as a function of its state and of the parameters it trains.

    After each step `evaluated(opt_state, params)` gives the parameters that evaluation, prediction and export use, as
    `optax.contrib.schedule_free_eval_params` does. It must be pure and map over pytrees: `opt_state` is that of
    `optimizer`, and leaves of frozen parameters are missing in both. Before the first step they are those trained.
    """
    extended = optax.with_extra_args_support(optimizer)
    out = EvaluatingOptimizer(extended.init, extended.update)
    out.evaluated = evaluated
    return out


def evaluated_by(optimizer: optax.GradientTransformation) -> Evaluated | None:
    """The function that `with_evaluated` gave the optimizer; None for one that evaluates what it trains."""
    return getattr(optimizer, "evaluated", None)


def ema(decay: float) -> Average:
    """The exponential moving average: a ← d a + (1 - d) v, where d is min(decay, (1 + step) / (10 + step)).

    The smaller d of the first steps, as in TensorFlow's ExponentialMovingAverage with `num_updates=step`, forgets the
    initial weights.
    """

    def update(average: Any, variables: Variables, step: jax.Array, opt_state: Any = None) -> tuple[Variables, Any]:
        t = step.astype(jnp.float32)
        share = 1 - jnp.minimum(jnp.float32(decay), (1 + t) / (10 + t))
        return variables, _mix(average, variables, share)

    return Average(_copy, update)


def lookahead(
    steps: Callable[[str], int], total: int, k: int = 5, alpha: float = 0.5, power: float = 0.0, start: str = ""
) -> Average:
    """Slow weights s, to which the weights v return every `k` steps: s ← s + alpha (v - s), v ← s.

    Zhang et al. 2019 (arXiv:1907.08610); the optimizer's state is kept when the weights return. If `power` is above 0,
    1 - (1 - alpha) (steps done / total)**power replaces alpha: it begins at 1 and ends at `alpha`. Until the first
    multiple of k after the duration `start`, the slow weights equal the others. airbench94, whose decay is 0.95 a step,
    averages from the first step on: lookahead(5, 0.226219, power=3), since 1 - 0.95**5 = 0.226219.
    """
    if type(k) is not int or k < 1 or not 0 < alpha <= 1 or power < 0:
        raise UserError(f"lookahead(k={k!r}, alpha={alpha}, power={power}): k must be a whole number from 1, "
                        "alpha above 0 and at most 1, power 0 or more")  # fmt: skip
    first = steps(start)
    begin = k * (first // k + 1) if first else 0

    def update(slow: Any, fast: Variables, step: jax.Array, opt_state: Any = None) -> tuple[Variables, Any]:
        done = step + 1
        share = 1 - (1 - alpha) * (done.astype(jnp.float32) / total) ** power
        slow = _where(done <= begin, fast, _where(done % k == 0, _mix(slow, fast, share), slow))
        return _where(done % k == 0, slow, fast), slow

    return Average(_copy, update)


def of_optimizer(evaluated: Evaluated) -> Average:
    """The parameters that an optimizer says are to be evaluated, and the batch statistics as they are."""

    def update(average: Any, variables: Variables, step: jax.Array, opt_state: Any = None) -> tuple[Variables, Any]:
        params, model_state = variables
        return variables, (evaluated(opt_state, params), model_state)

    return Average(_copy, update)


def build(
    decay: float,
    call: spec.Call | None,
    steps: Callable[[str], int],
    total: int,
    optimizer: optax.GradientTransformation | None = None,
) -> Average:
    """The average of the key `ema`, of the `lookahead(…)` in an optimizer spec, or what `optimizer` evaluates.

    `steps` turns a duration into whole steps of the `total`. Raises UserError if more than one is given.
    """
    if optimizer is not None and (evaluated := evaluated_by(optimizer)):
        if decay or call:
            raise UserError(f"{call or f'ema={decay}'} and the optimizer both say which weights are evaluated; leave "
                            "the first out")  # fmt: skip
        return of_optimizer(evaluated)
    if call is None:
        return ema(decay) if decay else NONE
    if decay:
        raise UserError(f"ema={decay} and {call} both say which weights are evaluated; leave one out")
    return spec.bind(call, {"lookahead": lookahead}, "optimizer", given=("steps", "total"))(steps, total)


def _copy(variables: Variables) -> Any:
    return jax.tree.map(jnp.copy, variables)


def _mix(old: Any, new: Any, share: jax.Array) -> Any:
    """old + share * (new - old), which leaves equal values unchanged; for integers the new value."""

    def mix(a: jax.Array, b: jax.Array) -> jax.Array:
        return a + share.astype(a.dtype) * (b - a) if jnp.issubdtype(a.dtype, jnp.inexact) else b

    return jax.tree.map(mix, old, new)


def _where(condition: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)

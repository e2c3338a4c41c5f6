"""Optimizers: optax's, by optax's own names."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from imgclf_jax import spec
from imgclf_jax.errors import UserError

# These take no schedule, or want more than the gradient at each update.
_UNFIT = ("lbfgs", "optimistic_adam", "rprop", "sm3")


def _optimizers() -> dict[str, object]:
    """Every public optax function whose first parameter is `learning_rate`, a schedule."""
    out: dict[str, object] = {}
    for name in dir(optax):
        function = getattr(optax, name)
        if not callable(function) or isinstance(function, type):
            continue
        if spec.takes(function, "learning_rate") and name not in _UNFIT and not name.startswith(("_", "scale_by_")):
            out[name] = function
    return out


def build(text: str, schedule: optax.Schedule, clip: float) -> optax.GradientTransformation:
    """The optimizer that a spec such as `adamw(weight_decay=1e-4)` names, after clipping to global norm `clip`.

    `clip` 0 is no clipping. The learning rate comes from `schedule`, never from the spec.
    """
    call = spec.parse_one(text)
    if call.args and ":" not in call.name:  # adam(1e-3) would set b1
        raise UserError(
            f"optimizer={text!r}: name the arguments, as in {call.name}(...={call.args[0]!r}); "
            "the learning rate is the schedule's"
        )
    optimizer = spec.bind(call, _optimizers(), "optimizer", given=("learning_rate",))(schedule)
    if clip:
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
    return optax.GradientTransformationExtraArgs(optimizer.init, promoting(optimizer.update))


def promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under JAX's standard dtype promotion, which optax relies on (`b1 ** count`), even in strict mode."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapped

"""Optimizers: optax's, by optax's own names."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from imgclf_jax import spec


def _optimizers() -> dict[str, object]:
    """Every public optax function whose first parameter is `learning_rate`."""
    out: dict[str, object] = {}
    for name in dir(optax):
        function = getattr(optax, name)
        if inspect.isfunction(function) and next(iter(inspect.signature(function).parameters), "") == "learning_rate":
            out[name] = function
    return out


def build(text: str, schedule: optax.Schedule, clip: float) -> optax.GradientTransformation:
    """The optimizer that a spec such as `adamw(weight_decay=1e-4)` names, after clipping to global norm `clip`.

    `clip` 0 is no clipping. The learning rate comes from `schedule`, never from the spec.
    """
    optimizer = spec.bind(spec.parse_one(text), _optimizers(), "optimizer", given=("learning_rate",))(schedule)
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

"""Optimizers: optax's, by optax's own names."""

import inspect

import optax

from imgclf_jax import spec


def _optimizers() -> dict[str, object]:
    """Every public optax function whose first parameter is `learning_rate`."""
    out = {}
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
    return optax.chain(optax.clip_by_global_norm(clip), optimizer) if clip else optimizer

"""`train --extend`: a run that goes on beyond the steps it was planned with, where that changes no step it has done."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core.errors import UserError
from imgclf_jax.optim.optimizers import promoting
from imgclf_jax.optim.weight_averages import evaluated_by
from imgclf_jax.recipe import Recipe

_PIECE = 100_000  # steps that are compared at once


def check(old: Recipe, new: Recipe, start: int, folder: Path) -> None:
    """Raises UserError unless the first `start` steps of the run in `folder` are the same by both recipes.

    These differ in `total` alone. A schedule that ends at `total`, such as cosine, gives other learning rates to steps
    that have been done, and so does a lookahead that follows it: such a run would be no run of any config.
    """
    if new.total < start:
        raise UserError(f"total={new.config.total!r} is {new.total} steps, but the run in {folder} has done {start}; "
                        "extend it to more")  # fmt: skip
    for first in range(0, start, _PIECE):
        steps = jnp.arange(first, min(first + _PIECE, start))
        for key, values in _VALUES.items():
            was, now = (np.asarray(jax.vmap(values(recipe))(steps)) for recipe in (old, new))
            if (was != now).any():
                step = int(np.argmax(np.abs(was - now)))
                raise UserError(
                    f"{key}={new.config[key]!r} follows total: at step {first + step} the run in {folder} had "
                    f"{was[step]:.6g}, and with total={new.config.total!r} it would have had {now[step]:.6g}; a run "
                    "can be extended if its schedule is constant, or steps at fixed durations. Start another run from "
                    f"its weights instead: --workdir NEW --config.init_from={folder}"
                )


def _rate(recipe: Recipe) -> Callable[[jax.Array], jax.Array]:
    return lambda step: jnp.asarray(promoting(recipe.schedule)(step), jnp.float32)


def _share(recipe: Recipe) -> Callable[[jax.Array], jax.Array]:
    """How much of new weights the average of weights takes over at a step."""
    if evaluated_by(recipe.optimizer):  # they follow from the optimizer's state, whatever the total
        return jnp.zeros_like
    one, zero = jnp.float32(1), jnp.float32(0)
    return lambda step: jnp.stack(jax.tree.leaves(recipe.average.update(one, zero, step))).sum()


_VALUES = {"schedule": _rate, "optimizer": _share}

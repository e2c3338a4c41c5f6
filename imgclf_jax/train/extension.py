"""`train --extend`: continues a run beyond its planned total, if that changes none of its past steps."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core.errors import UserError
from imgclf_jax.optim.optimizers import promoting
from imgclf_jax.optim.weight_averages import evaluated_by
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.cadences import Cadences

_PIECE = 100_000  # steps compared at once


def check(old: Recipe, new: Recipe, start: int, folder: Path) -> None:
    """Raises UserError unless both recipes, which differ in `total` alone, agree on the first `start` steps.

    A schedule that ends at `total`, such as cosine, would give past steps other learning rates, and so would a
    lookahead or a method that follows it; evaluations that follow it may have stopped the run early: no single config
    would describe such a run.
    """
    fix = f"Start another run from its weights instead: --workdir NEW --config.init_from={folder}"
    for first in range(0, start, _PIECE):
        steps = jnp.arange(first, min(first + _PIECE, start))
        for key, values in _VALUES.items():
            was, now = (np.asarray(jax.vmap(values(recipe))(steps)) for recipe in (old, new))
            if (was != now).any():
                step = int(np.argmax(np.abs(was - now)))
                raise UserError(
                    f"{key}={new.config[key]!r} follows total: at step {first + step} the run in {folder} had "
                    f"{was[step]:.6g}, and with total={new.config.total!r} it would have had {now[step]:.6g}; a run "
                    f"can be extended if its schedule is constant, or steps at fixed durations. {fix}"
                )
    _ = new.method  # asks for its durations, if the train step has not yet
    for duration, longer in new.method_steps.items() if start else ():
        if (shorter := old.steps("method", duration, old.total)) != longer:
            raise UserError(f"method={new.config.method!r} follows total: {duration} of it were {shorter} steps in the "
                            f"run in {folder}, and with total={new.config.total!r} they would have been {longer}; a "
                            f"run can be extended if its method counts steps or epochs. {fix}")  # fmt: skip
    if new.config.stop and (others := _evaluations(old, start) ^ _evaluations(new, start)):
        raise UserError(f"eval_every={new.config.eval_every!r} follows total: with total={new.config.total!r} the run "
                        f"in {folder} would have evaluated at other steps, from step {min(others)} on, and "
                        f"stop={new.config.stop!r} depends on them; a run can be extended if its eval_every counts "
                        f"steps or epochs. {fix}")  # fmt: skip


def _evaluations(recipe: Recipe, start: int) -> set[int]:
    """The steps before `start` after which a run evaluates."""
    return set(Cadences(recipe.total, None, recipe.period("eval_every"), None).evaluations(start - 1))


def _rate(recipe: Recipe) -> Callable[[jax.Array], jax.Array]:
    return lambda step: jnp.asarray(promoting(recipe.schedule)(step), jnp.float32)


def _share(recipe: Recipe) -> Callable[[jax.Array], jax.Array]:
    """The share of the new weights in the weight average at a step."""
    if evaluated_by(recipe.optimizer):  # the evaluated weights follow from the optimizer's state, whatever the total
        return jnp.zeros_like
    one, zero = jnp.float32(1), jnp.float32(0)
    return lambda step: jnp.stack(jax.tree.leaves(recipe.average.update(one, zero, step))).sum()


_VALUES = {"schedule": _rate, "optimizer": _share}

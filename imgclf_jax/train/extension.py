"""`train --extend`: continues a run beyond its planned total, if that changes none of its past steps."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core.errors import UserError
from imgclf_jax.optim.optimizers import promoting
from imgclf_jax.optim.weight_averages import evaluated_by
from imgclf_jax.recipe import Recipe


def check(old: Recipe, new: Recipe, start: int, folder: Path) -> None:
    """Raises UserError unless both recipes, which differ in `total` alone, agree on the first `start` steps.

    A schedule that ends at `total`, such as cosine, would give past steps other learning rates, and so would a
    lookahead or a method that follows it: no single config would describe such a run.
    """
    found = []
    for key, values in (("schedule", _learning_rates), ("optimizer", _average_weights)):
        was, now = values(old, start), values(new, start)
        if (was != now).any():
            step = int(np.argmax(was != now))
            found.append(f"{key}={new.config[key]!r} follows total: {was[step]:.6g} at step {step} would have been "
                         f"{now[step]:.6g}")  # fmt: skip
    _ = new.method  # asks for its durations, if the train step has not yet
    for duration, longer in new.method_steps.items() if start else ():
        if (shorter := old.steps("method", duration, old.total)) != longer:
            found.append(f"method={new.config.method!r} follows total: {duration} of it were {shorter} steps and would "
                         f"have been {longer}")  # fmt: skip
    if found:
        raise UserError(f"{found[0]} with total={new.config.total!r} in the run in {folder}; a run can be extended if "
                        "its schedule is constant, or counts steps or epochs. Start another run from its weights "
                        f"instead: --workdir NEW --config.init_from={folder}")  # fmt: skip


def _learning_rates(recipe: Recipe, steps: int) -> np.ndarray:
    """The learning rate f32[steps] of each step."""
    return np.asarray(jax.vmap(lambda step: jnp.asarray(promoting(recipe.schedule)(step), jnp.float32))(
        jnp.arange(steps)))  # fmt: skip


def _average_weights(recipe: Recipe, steps: int) -> np.ndarray:
    """The weight f32[steps] of the new parameters in the weight average at each step."""
    if evaluated_by(recipe.optimizer):  # the average follows from the optimizer's state, whatever the total
        return np.zeros(steps, np.float32)
    one, zero = jnp.float32(1), jnp.float32(0)
    update = lambda step: jnp.stack(jax.tree.leaves(recipe.average.update(one, zero, step))).sum()  # noqa: E731
    return np.asarray(jax.vmap(update)(jnp.arange(steps)))

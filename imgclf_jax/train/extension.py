"""`train --extend`: continues a run beyond its planned total, if that changes none of its past steps."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core.errors import UserError
from imgclf_jax.optim.optimizers import promoting
from imgclf_jax.recipe import Recipe


def check(old: Recipe, new: Recipe, start: int, folder: Path) -> None:
    """Raises UserError unless both recipes, which differ in `total` alone, agree on the first `start` steps.

    A schedule that ends at `total`, such as cosine, would give past steps other learning rates, and so would a
    lookahead or a method that follows it: no single config would describe such a run.
    """
    if not start:
        return
    found, (was, now) = [], (_learning_rates(one, start) for one in (old, new))
    if (was != now).any():
        step = int(np.argmax(was != now))
        found.append(f"schedule={new.config.schedule!r} follows total: {was[step]:.6g} at step {step} would have been "
                     f"{now[step]:.6g}")  # fmt: skip
    if new.average.follows_total:
        found.append(f"optimizer={new.config.optimizer!r} follows total: lookahead would average past steps otherwise")
    _ = new.method  # asks for its durations, if the train step has not yet
    for duration, longer in new.method_steps.items():
        if (shorter := old.steps("method", duration, old.total)) != longer:
            found.append(f"method={new.config.method!r} follows total: {duration} of it were {shorter} steps and would "
                         f"have been {longer}")  # fmt: skip
    if found:
        raise UserError(f"{found[0]} with total={new.config.total!r} in the run in {folder}; a run can be extended if "
                        "its schedule is constant, or counts steps or epochs. Start another run from its weights "
                        f"instead: --workdir NEW --config.init_from={folder}")  # fmt: skip


def _learning_rates(recipe: Recipe, steps: int) -> np.ndarray:
    """The learning rate f32[steps] of each step."""
    rate = lambda step: jnp.asarray(promoting(recipe.schedule)(step), jnp.float32)  # noqa: E731
    return np.asarray(jax.vmap(rate)(jnp.arange(steps)))

"""Diagnosis of failures: the config key that cannot be traced, and the examples of a nonfinite step."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import metrics
from imgclf_jax.core import json_files, processes, rng, spec
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.data import stream
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.provenance import raised_in_user_code
from imgclf_jax.step import NONFINITE_STEP

_TRACED_KEYS = ("method", "gradient", "model", "augment", "mix", "tta", "loss", "optimizer", "schedule")


@contextlib.contextmanager
def naming_the_key(recipe: Recipe) -> Iterator[None]:
    """Raises UserError naming the config key at fault if tracing fails inside.

    Functions of a recipe name their own keys: see `Recipe.naming`. What fails elsewhere is the model, or something that
    the user's own code returns. Errors raised in the user's own code pass unchanged, with their traceback.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # JAX, Flax and Optax raise many types
        images = jax.ShapeDtypeStruct((1, *recipe.data.image_shape), "float32")
        for key, model in (("model", recipe.plain_model), ("method", recipe.model)):
            init = functools.partial(model.init, rng.init_streams(jax.random.key(0)), train=False)
            jax.eval_shape(recipe.naming(key)(init), images)
        own = [f"{key}={recipe.config[key]!r}" for key in _TRACED_KEYS if spec.names_code(recipe.config[key])]
        if own and not raised_in_user_code(e):
            raise UserError(f"{' or '.join(own)} returns something that the step cannot use: {reason(e)}") from e
        raise


def refuse_nonfinite(
    sums: metrics.Sums, config: ConfigDict, images: stream.Images, checkpoints: Checkpoints, folder: Path
) -> None:
    """Raises UserError if `sums`, on the host, record a nonfinite step; writes its examples to nonfinite.json."""
    by_seed = np.atleast_1d(sums[NONFINITE_STEP])
    step, seed = int(by_seed.min()), config.seed + int(by_seed.argmin())
    if step == metrics.NO_STEP:
        return
    checkpoints.wait()
    ids = images.sampler.ids(seed, step * config.batch_size + np.arange(config.batch_size, dtype=np.int64)).tolist()
    file, names = folder / "nonfinite.json", [images.source.example_name(i) for i in ids]
    record = {"step": step, "seed": seed, "example_ids": ids, "examples": names}
    processes.broadcast(lambda: json_files.write(file, record))
    good = checkpoints.steps()
    kept = f"the last good checkpoint is of step {good[-1]}" if good else "no checkpoint had been saved yet"
    raise UserError(
        f"the loss, gradient or parameters are not finite at step {step}, on the example ids {str(ids[:8])[:-1]}, …] "
        f"(all in {file}); {kept}; inspect those examples, lower the learning rate, set clip=1.0, or skip such steps: "
        "on_bad_step='skip', in a new --workdir"
    )

"""Diagnosis of failures: the config key that cannot be traced, the examples of a nonfinite step, oversized arrays."""

import contextlib
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax.errors import ScopeCollectionNotFound, ScopeParamNotFoundError
from ml_collections import ConfigDict

from imgclf_jax import metrics, step
from imgclf_jax.core import json_files, memory, processes, rng, spec, tree
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

    Functions of a recipe name their own keys: see `Recipe.named`. What fails elsewhere is the model, or something that
    the user's own code returns. Errors raised in the user's own code pass unchanged, with their traceback.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # JAX, Flax and Optax raise many types
        config, method = recipe.config, recipe.method
        missing = isinstance(e, ScopeParamNotFoundError | ScopeCollectionNotFound) and re.search(
            'parameter.* in scope "/head[/"]|collection "params" in "/head[/"]', str(e)
        )
        if missing and not method.predicts:
            raise UserError(f"method={config.method!r} calls the head, but predicts=False gives its model none; "
                            "drop predicts=False, or use another module") from e  # fmt: skip
        images = jax.ShapeDtypeStruct((1, *recipe.data.image_shape), "float32")
        for key, model in (("model", recipe.plain_model), ("method", recipe.model)):
            init = functools.partial(model.init, rng.init_streams(jax.random.key(0)), train=False)
            jax.eval_shape(recipe.named(key, init), images)
        own = [f"{key}={config[key]!r}" for key in _TRACED_KEYS if spec.names_code(config[key])]
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
    rows = np.arange(config.batch_size, dtype=np.int64)
    ids = images.sampler.ids(seed, step * config.batch_size + rows).tolist()
    file = folder / "nonfinite.json"
    names = [images.source.example_name(i) for i in ids]
    record = {"step": step, "seed": seed, "example_ids": ids, "examples": names}
    processes.broadcast(lambda: json_files.write(file, record))
    good = checkpoints.steps()
    kept = f"the last good checkpoint is of step {good[-1]}" if good else "no checkpoint had been saved yet"
    raise UserError(
        f"the loss, gradient or parameters are not finite at step {step}, on the example ids {str(ids[:8])[:-1]}, …] "
        f"(all in {file}); {kept}; inspect those examples, lower the learning rate, set clip=1.0, or skip such steps: "
        "on_bad_step='skip', in a new --workdir"
    )


def check_size(recipe: Recipe, state: step.TrainState, in_memory: bool) -> None:
    """Raises UserError for an empty parameter and, with `in_memory`, for a state or batch beyond the host's memory.

    `state` holds the shapes of the train state. Set `in_memory` if the devices use the host's memory.
    """
    config = recipe.config
    for name, x in tree.named_leaves(state.params):
        if 0 in x.shape:
            raise UserError(f"model={config.model!r}: the parameter {name} {list(x.shape)} is empty; make every width"
                            " 1 or more")  # fmt: skip
    if in_memory:
        nbytes = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(state))
        memory.require(nbytes, f"the train state of model={config.model!r} with num_seeds={config.num_seeds}")
        images = config.batch_size * config.num_seeds * math.prod(recipe.data.image_shape)
        memory.require(5 * images, f"a batch of batch_size={config.batch_size}")  # as uint8 and as float32

"""What a failure comes from: the key of the config that cannot be traced, the examples of a step that is not finite."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeCollectionNotFound, ScopeParamNotFoundError
from ml_collections import ConfigDict

from imgclf_jax import metrics, step
from imgclf_jax.core import memory, processes, rng, spec
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.data import stream
from imgclf_jax.methods.gradients import Gradient
from imgclf_jax.optim import optimizers
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.provenance import write_json


@contextlib.contextmanager
def naming_the_key(recipe: Recipe) -> Iterator[None]:
    """Where tracing inside fails, the parts are traced one by one, so that the error can name a config key."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # JAX, Flax and Optax raise many types
        if isinstance(e, ScopeParamNotFoundError | ScopeCollectionNotFound) and not recipe.method.predicts:
            raise UserError(f"method={recipe.config.method!r} says predicts=False, so its model has no head, and it "
                            "calls one; give it another module, or drop predicts=False") from e  # fmt: skip
        find(recipe)
        raise


def find(recipe: Recipe) -> None:
    """Raises UserError that names the first key of a config whose part cannot be traced, if one cannot.

    An error in the user's own code, which is named by an import path, is raised as it is.
    """
    config, image_shape = recipe.config, recipe.data.image_shape
    images = jax.ShapeDtypeStruct((config.batch_size, *image_shape), "uint8")
    labels = jax.ShapeDtypeStruct((config.batch_size,), "int32")
    logits = jax.ShapeDtypeStruct((config.batch_size, len(recipe.data.class_names)), "float32")
    wanted = logits if recipe.data.target_names else labels

    def draw(images: jax.Array, ids: jax.Array) -> jax.Array:
        known = (jnp.uint32(0), ids, ids) if recipe.with_ids else ()
        return recipe.augment(train=True)(rng.key(0, "augment"), images, *known)

    def mix(images: jax.Array, ids: jax.Array) -> Any:
        return recipe.mix and recipe.mix(rng.key(0, "mix"), draw(images, ids))

    def init_and_update() -> step.TrainState:
        parts = recipe.model, recipe.optimizer, image_shape, 0, recipe.average
        state = step.init_state(*parts, head=recipe.method.predicts)
        gradient = Gradient(lambda params, *_: ((jnp.float32(0), None), params), lambda *_: jnp.float32(0))
        extra = gradient.extra_arguments(jnp.float32(0), state.params, None, None, rng.key(0, "dropout"))
        recipe.optimizer.update(state.params, state.opt_state, state.params, **extra)
        return state

    def trace(key: str, function: Callable[..., Any], *args: Any) -> None:
        try:
            jax.eval_shape(function, *args)
        except UserError:
            raise
        except Exception as e:
            if spec.names_code(config[key]):
                raise  # the user's own code: the traceback shows where
            where = f" on images {list(image_shape)}" if key in ("augment", "mix", "model") else ""
            raise UserError(f"{key}={config[key]!r} fails{where}: {reason(e)}") from e

    zeros = jnp.zeros((1, *image_shape), jnp.float32)
    trace("schedule", lambda step: optimizers.promoting(recipe.schedule)(step), jax.ShapeDtypeStruct((), "int32"))
    trace("augment", draw, images, labels)
    trace("mix", mix, images, labels)
    trace("model", lambda: recipe.model.init(rng.init_streams(rng.key(0, "init")), zeros, train=False))
    trace("loss", lambda logits, labels: recipe.loss(logits, labels), logits, wanted)
    trace("optimizer", init_and_update)


def check_finite(
    window: metrics.Sums, config: ConfigDict, images: stream.Images, checkpoints: Checkpoints, folder: Path
) -> None:
    """Raises UserError for a step whose loss, gradient or parameters were not finite.

    `window`, on the host, holds that step. Its examples are written to `folder`/nonfinite.json.
    """
    by_seed = np.atleast_1d(window["nonfinite_step"])
    bad = int(by_seed.min())
    if bad == metrics.NO_STEP:
        return
    checkpoints.wait()
    seed = config.seed + int(by_seed.argmin())
    rows = np.arange(config.batch_size, dtype=np.int64)
    ids = images.ids(seed, stream.positions(range(bad, bad + 1), config.batch_size, rows)).tolist()
    file = folder / "nonfinite.json"
    name = getattr(images.source, "name", None)
    names = [name(i) for i in ids] if name else None
    found = {"step": bad, "seed": seed, "example_ids": ids, "examples": names}
    processes.broadcast_from_process_0("writing nonfinite.json", lambda: write_json(file, found))
    good = checkpoints.steps()
    kept = f"the last good checkpoint, of step {good[-1]}, is kept" if good else "no checkpoint had been saved yet"
    raise UserError(
        f"the loss, gradient or parameters are not finite at step {bad}, on the example ids {str(ids[:8])[:-1]}, …] "
        f"(all in {file}); {kept}; look at those examples, or lower the learning rate, or set clip=1.0"
    )


def check_size(recipe: Recipe, state: Any, in_memory: bool) -> None:
    """Raises UserError for a parameter without elements and, with `in_memory`, for what the machine cannot hold.

    `state` are the shapes of the train state; its arrays and a batch are then in the machine's own memory.
    """
    config = recipe.config
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        if 0 in x.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(f"model={config.model!r}: the parameter {name} {list(x.shape)} has no elements; every width"
                            " must be 1 or more")  # fmt: skip
    if in_memory:
        nbytes = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(state))
        memory.require(nbytes, f"the train state of model={config.model!r} with num_seeds={config.num_seeds}")
        images = config.batch_size * config.num_seeds * math.prod(recipe.data.image_shape)
        memory.require(5 * images, f"a batch of batch_size={config.batch_size}")  # as uint8 and as float32
        calls = min(config.steps_per_call, recipe.total)
        memory.require(calls * images, f"what a call is given with steps_per_call={config.steps_per_call}")

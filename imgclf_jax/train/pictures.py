"""Augmented images of a training batch, for TensorBoard and the report."""

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.augment.pixels import to_pixels
from imgclf_jax.core import rng
from imgclf_jax.core.typing import Batch, PyTree
from imgclf_jax.data.stream import Images
from imgclf_jax.programs import Programs

_SHOWN = 16


def augment_rows(programs: Programs, images: Images, ids: np.ndarray, step: int, rows: int) -> np.ndarray:
    """Augments the examples `ids` int64[n] as the first ones of a step's batch: f32[n, h, w, c].

    Host ops have the keys of the stream's positions, device ops that of the step, and of several seeds the first one's.
    `rows` is the size of the batch, of which the rest is black.
    """
    config, recipe, count = programs.recipe.config, programs.recipe, len(ids)

    @jax.jit
    def augment(step: jax.Array, batch: jax.Array, ids: jax.Array, epochs: jax.Array) -> PyTree:
        known = (jnp.uint32(config.seed), ids, epochs) if recipe.needs_ids else ()
        key = rng.key(jnp.uint32(config.seed), "augment", step)
        return recipe.augment(train=True)(key, batch, *known)[:count]

    positions = step * int(config.batch_size) + np.arange(count, dtype=np.int64)
    batch = np.zeros((rows, *images.shape), np.uint8)  # full size, because draws may depend on the batch size
    batch[:count] = images.read(ids, positions)["image"]
    padded_ids, epochs = np.zeros((2, rows), np.int32)
    padded_ids[:count], epochs[:count] = ids, images.epochs(positions)
    with programs.tracing():
        return np.asarray(augment(np.int32(step), batch, padded_ids, epochs))


def first_batch(programs: Programs, images: Images) -> Batch:
    """The first images that a run trains on, after augmentation and before normalization: {name: f32[n, h, w, c]}.

    A method with `inputs` uses keys of its own, so it trains on other draws.
    """
    size = int(programs.recipe.config.batch_size)
    ids = images.ids(programs.recipe.config.seed, np.arange(min(_SHOWN, size), dtype=np.int64))
    augmented = augment_rows(programs, images, ids, 0, size)
    return {"train/augmented": to_pixels(augmented, programs.recipe.config.augment)[0]}

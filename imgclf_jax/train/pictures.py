"""Augmented images of the first batch, for TensorBoard and the writers that take images."""

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.augment.pixels import to_pixels
from imgclf_jax.core import rng
from imgclf_jax.core.typing import Batch
from imgclf_jax.data.stream import Images
from imgclf_jax.programs import Programs

_SHOWN = 16


def first_batch(programs: Programs, images: Images) -> Batch:
    """The first images that a run trains on, after augmentation and before normalization: {name: f32[n, h, w, c]}.

    With several seeds, those of the first. A method with `inputs` uses keys of its own, so it trains on other draws.
    """
    recipe, config = programs.recipe, programs.recipe.config
    seed, positions = np.uint32(config.seed), np.arange(config.batch_size, dtype=np.int64)
    ids = images.ids(config.seed, positions)
    known = (seed, ids.astype(np.int32), images.epochs(positions).astype(np.int32)) if recipe.needs_ids else ()
    batch = np.zeros((len(ids), *images.shape), np.uint8)  # full size, because draws may depend on the batch size
    batch[:_SHOWN] = images.read(ids[:_SHOWN], positions[:_SHOWN])["image"]

    @jax.jit
    def augment(batch: jax.Array, *known: jax.Array) -> jax.Array:
        return recipe.augment(train=True)(rng.key(jnp.uint32(seed), "augment", jnp.int32(0)), batch, *known)[:_SHOWN]

    with programs.tracing():
        augmented = np.asarray(augment(batch, *known))
    return {"train/augmented": to_pixels(augmented, config.augment)[0]}

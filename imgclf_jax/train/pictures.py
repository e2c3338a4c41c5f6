"""Augmented images of the first batch, for TensorBoard and the writers that take images."""

import dataclasses

import jax
import numpy as np

from imgclf_jax.augment.ops import to_pixels
from imgclf_jax.core.typing import Batch
from imgclf_jax.data import stream
from imgclf_jax.programs import Programs
from imgclf_jax.step import make_inputs

_SHOWN = 16


def first_batch(programs: Programs, images: stream.Images) -> Batch:
    """The first images that a run trains on, after augmentation and before normalization: {name: f32[n, h, w, c]}.

    With several seeds, those of the first. A method with `inputs` uses keys of its own, so it trains on other draws.
    """
    config = programs.recipe.config
    [(_, batch)] = stream.batches(images, dataclasses.replace(programs.stream, num_seeds=1), [0], prefetch=0)
    with programs.tracing():
        inputs = jax.jit(make_inputs(programs.recipe.augment(train=True)))
        augmented = np.asarray(inputs(np.uint32(config.seed), np.int32(0), batch)["image"][:_SHOWN])
    return {"train/augmented": to_pixels(augmented, config.augment)}

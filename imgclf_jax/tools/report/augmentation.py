"""Augmented training images for a report, drawn with the keys of the run's steps."""

import dataclasses
import math

import numpy as np

from imgclf_jax import datasets
from imgclf_jax.augment import ops
from imgclf_jax.augment.pixels import to_pixels
from imgclf_jax.data.source import Source
from imgclf_jax.programs import Programs
from imgclf_jax.train.pictures import augment_rows

_IMAGES, _DRAWS = 8, 4
_MAX_BYTES = 64 << 20  # of the batch whose first images are drawn


@dataclasses.dataclass(frozen=True, eq=False)
class Augmented:
    """Training images, and augmented versions of each."""

    names: tuple[str, ...]
    images: np.ndarray  # uint8[n, h, w, c], after the host ops of evaluation
    draws: np.ndarray  # f32[n, draws, h, w, c] in [0, 1]
    steps: tuple[int, ...]  # the step of each draw
    differs: str  # why the draws are not those of training; "" if the first is what step 0 trains on
    stretched: bool  # see `to_pixels`


def draw(programs: Programs, source: Source) -> Augmented | None:
    """Augments the first images of the run's first batch several times; None if augmentation draws nothing.

    Each draw has the keys of a step: host ops those of its stream positions, device ops that of the step. The first
    draw is what step 0 trains on, unless the method uses keys of its own or the batch is too large; the others have the
    keys of the first steps of the following epochs.
    """
    config = programs.recipe.config
    n, b = source.size, int(config.batch_size)
    images = datasets.train_images(source, config)
    if not images.random and not ops.is_random(config.augment):
        return None
    count = min(_IMAGES, b, n)
    rows = min(b, max(count, _MAX_BYTES // math.prod(images.shape)))
    ids = images.ids(config.seed, np.arange(count, dtype=np.int64))
    steps = tuple(-(-epoch * images.sampler.epoch // b) for epoch in range(_DRAWS))
    differs = (
        f"method={config.method!r} uses keys of its own" if programs.recipe.method.inputs
        else "to save memory, their batch is smaller" if rows < b else ""
    )  # fmt: skip
    draws = [augment_rows(programs, images, ids, step, rows) for step in steps]
    pixels, stretched = to_pixels(np.stack(draws, 1), config.augment)
    return Augmented(
        tuple(source.example_name(int(i)) for i in ids), programs.eval_images(source).read(ids, ids)["image"], pixels,
        steps, differs, stretched,
    )  # fmt: skip

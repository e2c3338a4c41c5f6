"""What a report shows of augmentation: training images as they are, and as the run's own keys draw them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.augment import ops
from imgclf_jax.core import rng
from imgclf_jax.data.stream import train_images
from imgclf_jax.programs import Programs
from imgclf_jax.tools.pages.shown import as_pixels

_IMAGES, _DRAWS = 8, 4
_MOST_BYTES = 64 << 20  # of a batch that is made to draw for its first images


@dataclasses.dataclass(frozen=True, eq=False)
class Augmented:
    """Training images as they are, and as augmentation draws them."""

    names: tuple[str, ...]
    images: np.ndarray  # uint8[n, h, w, c], after the host ops of evaluation
    draws: np.ndarray  # f32[n, draws, h, w, c] in [0, 1]
    steps: tuple[int, ...]  # whose keys drew them
    whole_batch: bool  # whether these are the draws of the run, whose batch may be too large for this
    stretched: bool  # see `as_pixels`


def draw(programs: Programs, source: Any) -> Augmented | None:
    """The first images of the run's first batch, as they are and as augmentation draws them; None if nothing is drawn.

    A draw has the keys of a step: host ops those of its stream positions, device ops that of the step. The first draw
    is what step 0 trains on. The others are of the first steps of the epochs after it, for the same images.
    """
    config, recipe = programs.recipe.config, programs.recipe
    n, b = len(source), int(config.batch_size)
    drawn = train_images(source, config)
    if not drawn.random and not ops.is_random(config.augment):
        return None
    augment = recipe.augment(train=True)
    count = min(_IMAGES, b, n)
    rows = min(b, max(count, _MOST_BYTES // math.prod(drawn.shape)))
    ids = drawn.ids(config.seed, np.arange(count, dtype=np.int64))
    steps = tuple(-(-epoch * drawn.sampler.epoch // b) for epoch in range(_DRAWS))

    @jax.jit
    def augmented(step: Any, batch: Any, ids: Any, epochs: Any) -> Any:
        known = (jnp.uint32(config.seed), ids, epochs) if recipe.with_ids else ()
        return augment(rng.key(jnp.uint32(config.seed), "augment", step), batch, *known)[:count]

    found = []
    for step in steps:
        positions = step * b + np.arange(count, dtype=np.int64)
        batch = np.zeros((rows, *drawn.shape), np.uint8)  # draws may depend on how many images there are
        batch[:count] = drawn.read(ids, positions)["image"]
        own, epochs = np.zeros((2, rows), np.int32)
        own[:count], epochs[:count] = ids, drawn.epochs(positions)
        with programs.tracing():
            found.append(np.asarray(augmented(np.int32(step), batch, own, epochs)))
    pixels, stretched = as_pixels(np.stack(found, 1), config.augment)
    called = getattr(source, "name", "example {}".format)
    return Augmented(
        tuple(called(int(i)) for i in ids), programs.eval_images(source).read(ids, ids)["image"], pixels, steps,
        rows == b, stretched,
    )  # fmt: skip

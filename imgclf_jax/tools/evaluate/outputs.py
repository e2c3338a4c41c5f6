"""A model's features or logits of a data set, batch by batch."""

import functools
from collections.abc import Iterator

import jax
import numpy as np

from imgclf_jax import datasets
from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources, stream
from imgclf_jax.data.read_ahead import run_ahead
from imgclf_jax.data.source import Source
from imgclf_jax.step import Outputs
from imgclf_jax.trained import Trained


def compute_batches(
    model: Trained, images: stream.Images, what: Outputs = "features"
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (features f32[seeds, b, d], labels i32[b] or targets f32[b, k]) per batch, each example once, in order.

    `what` may also be "logits". Raises UserError, naming the example, for nonfinite values.
    """
    programs, done = model.programs, 0
    rows = sharding.rows_here(programs.eval_batch_size, programs.mesh)
    infer = functools.partial(programs.inference(what), *model.state.evaluated)
    results = ((infer(sharding.put_batch(batch["image"][rows], programs.mesh)), batch)
               for batch in stream.eval_batches(images, programs.eval_batch_size))  # fmt: skip
    for out, batch in run_ahead(results, 1):  # while the device computes the next batch
        values = np.asarray(jax.device_get(out))
        values = (values if programs.recipe.config.num_seeds > 1 else values[None])[:, batch["mask"]]
        if (broken := np.flatnonzero(~np.isfinite(values).all((0, 2)))).size:
            name = images.source.example_name(done + int(broken[0]))
            raise UserError(f"{name}: the {what} are NaN or infinite; the weights may have NaN, so try another "
                            "--checkpoint")  # fmt: skip
        done += values.shape[1]
        yield values, batch[images.source.label_key][batch["mask"]]


def training_features(model: Trained, base: dict[str, Source]) -> tuple[np.ndarray, np.ndarray]:
    """The features f32[seeds, n, d] and the labels or targets of the training split, without augmentation."""
    source = sources.take_split(base, model.config.data.train)
    return compute(model, datasets.eval_images(source, model.config, model.programs.recipe.data.bits))


def compute(model: Trained, images: stream.Images, what: Outputs = "features") -> tuple[np.ndarray, np.ndarray]:
    """Returns (features or logits f32[seeds, n, d], labels i32[n] or targets f32[n, k]) of a set, in memory."""
    batches = list(compute_batches(model, images, what))
    return np.concatenate([features for features, _ in batches], 1), np.concatenate([labels for _, labels in batches])

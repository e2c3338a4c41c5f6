"""Features of data sets, batch by batch."""

from collections.abc import Iterator

import jax
import numpy as np

from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Batch
from imgclf_jax.data import stream
from imgclf_jax.trained import Trained


def compute_batches(model: Trained, images: stream.Images) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (features f32[seeds, b, d], labels i32[b] or targets f32[b, k]) per batch, each example once, in order.

    Raises UserError, naming the example, for nonfinite features.
    """
    programs, done = model.programs, 0
    size = programs.eval_batch_size
    rows = sharding.rows_here(size, programs.mesh)

    def finish(out: jax.Array, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        nonlocal done
        features = np.asarray(jax.device_get(out))
        features = (features if programs.recipe.config.num_seeds > 1 else features[None])[:, batch["mask"]]
        if (broken := np.flatnonzero(~np.isfinite(features).all((0, 2)))).size:
            name = images.source.example_name(done + int(broken[0]))
            raise UserError(f"{name}: the features are NaN or infinite; the weights may have NaN, so try another "
                            "--checkpoint")  # fmt: skip
        done += features.shape[1]
        return features, batch[images.source.label_key][batch["mask"]]

    pending: tuple[jax.Array, Batch] | None = None
    for batch in stream.eval_batches(images, size):
        placed = sharding.put_batch(batch["image"][rows], programs.mesh)
        out = programs.inference("features")(*model.state.evaluated, placed)
        if pending:
            yield finish(*pending)  # while the device computes the next batch
        pending = out, batch
    if pending:
        yield finish(*pending)


def compute(model: Trained, images: stream.Images) -> tuple[np.ndarray, np.ndarray]:
    """Returns (features f32[seeds, n, d], labels i32[n] or targets f32[n, k]) of a set, in memory."""
    batches = list(compute_batches(model, images))
    return np.concatenate([features for features, _ in batches], 1), np.concatenate([labels for _, labels in batches])

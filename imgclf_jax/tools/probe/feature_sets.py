"""The features of data sets, batch by batch."""

from collections.abc import Iterator

import jax
import numpy as np

from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import stream
from imgclf_jax.trained import Trained


def features_of_set(model: Trained, images: stream.Images) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(features f32[seeds, b, d], labels i32[b] or targets f32[b, k]) of each batch, each example once and in order.

    Raises UserError, naming the example, for features that are not finite.
    """
    programs, done = model.programs, 0
    size = programs.eval_batch_size
    rows = sharding.rows_here(size, programs.mesh)

    def finish(out: jax.Array, batch: stream.Batch) -> tuple[np.ndarray, np.ndarray]:
        nonlocal done
        features = np.asarray(jax.device_get(out))
        features = (features if programs.recipe.num_seeds > 1 else features[None])[:, batch["mask"]]
        if (broken := np.flatnonzero(~np.isfinite(features).all((0, 2)))).size:
            name = getattr(images.source, "name", "example {}".format)(done + int(broken[0]))
            raise UserError(f"{name}: its features are NaN or infinite; the weights may hold NaN, so try another "
                            "--checkpoint")  # fmt: skip
        done += features.shape[1]
        return features, batch[images.y_name][batch["mask"]]

    pending: tuple[jax.Array, stream.Batch] | None = None
    for batch in stream.eval_batches(images, size):
        placed = sharding.put_batch({"image": batch["image"][rows]}, programs.mesh)["image"]
        out = programs.features(*model.state.evaluated, placed)
        if pending:
            yield finish(*pending)  # while the device computes the next batch
        pending = out, batch
    if pending:
        yield finish(*pending)


def whole_set(model: Trained, images: stream.Images) -> tuple[np.ndarray, np.ndarray]:
    """(features f32[seeds, n, d], labels i32[n] or targets f32[n, k]) of a whole set, in memory."""
    parts = list(features_of_set(model, images))
    return np.concatenate([features for features, _ in parts], 1), np.concatenate([labels for _, labels in parts])

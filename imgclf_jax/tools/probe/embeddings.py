"""Files of features: one vector per image, with its name and label."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import escape_surrogates


class Embeddings:
    """Features that are collected batch by batch, and written as an .npz file."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sets: list[str] = []
        self.labels: list[np.ndarray] = []
        self.features: list[np.ndarray] = []

    def add(self, set_name: str, names: Sequence[str], labels: np.ndarray, features: np.ndarray) -> None:
        """Adds images: labels i32[b] (-1 is unknown) or targets f32[b, k] (NaN is), features f32[seeds, b, d]."""
        self.names += map(escape_surrogates, names)
        self.sets += [set_name] * len(names)
        self.labels.append(labels)
        self.features.append(features)

    def write(self, path: Path, class_names: Sequence[str]) -> None:
        """Writes the file atomically. Raises UserError if there are no images.

        It has `features` f32[n, d] ([seeds, n, d] for several seeds), `names`, `sets`, and either `labels` i32[n] and
        `class_names`, or `targets` f32[n, k] and `target_names`.
        """
        if not self.names:
            raise UserError(f"cannot write {path}: no image has features")
        features, labels = np.concatenate(self.features, 1), np.concatenate(self.labels)
        kinds = ("labels", "class_names") if labels.ndim == 1 else ("targets", "target_names")
        shown = np.array([escape_surrogates(name) for name in class_names])
        with paths.replacing(path) as file:
            np.savez(file, allow_pickle=False, features=features[0] if len(features) == 1 else features,
                     names=np.array(self.names), sets=np.array(self.sets),
                     **dict(zip(kinds, (labels, shown), strict=True)))  # fmt: skip

"""Files of features: one vector per image, with its name and label."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import escape_surrogates


class Part(NamedTuple):
    """A batch of images: labels i32[b] (-1 is unknown) or targets f32[b, k] (NaN is), features f32[seeds, b, d]."""

    set: str
    names: list[str]
    labels: np.ndarray
    features: np.ndarray


def write(path: Path, parts: Sequence[Part], class_names: Sequence[str]) -> int:
    """Writes an .npz file atomically; returns the number of images. Raises UserError if there are none.

    It has `features` f32[n, d] ([seeds, n, d] for several seeds), `names`, `sets`, and either `labels` i32[n] and
    `class_names`, or `targets` f32[n, k] and `target_names`.
    """
    if not parts:
        raise UserError(f"cannot write {path}: no image has features")
    features, labels = np.concatenate([part.features for part in parts], 1), np.concatenate([p.labels for p in parts])
    kinds = ("labels", "class_names") if labels.ndim == 1 else ("targets", "target_names")
    names = np.array([escape_surrogates(name) for part in parts for name in part.names])
    shown, sets = np.array(list(map(escape_surrogates, class_names))), np.array([p.set for p in parts for _ in p.names])
    with paths.replacing(path) as file:
        np.savez(file, allow_pickle=False, features=features[0] if len(features) == 1 else features, names=names,
                 sets=sets, **dict(zip(kinds, (labels, shown), strict=True)))  # fmt: skip
    return len(names)

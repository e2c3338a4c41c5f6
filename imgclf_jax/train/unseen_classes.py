"""Classes of an evaluation set that no training example has, such as those whose folders are spelled differently."""

import re
import unicodedata
from collections.abc import Mapping

import numpy as np

from imgclf_jax.data import stream


def unseen_class_warnings(train: stream.Images, evals: Mapping[str, stream.Images]) -> list[str]:
    """A sentence for each evaluation set with classes that no training example has.

    The training examples are those that `data.sampling` may draw. Sets without labels in memory are skipped.
    """
    labels, names = train.source.labels, train.source.class_names
    if labels is None or train.source.target_names:
        return []
    if train.sampler.drawn is not None:
        labels = labels[train.sampler.drawn]
    is_seen = np.bincount(labels, minlength=len(names)) > 0
    seen = {_plain(name): name for name, trained in zip(names, is_seen, strict=True) if trained}
    found = []
    for eval_name, images in evals.items():
        if (labels := images.source.labels) is not None:
            counts = np.where(is_seen, 0, np.bincount(labels, minlength=len(names)))
            if counts.any():
                found.append(_sentence(eval_name, {names[c]: int(counts[c]) for c in np.flatnonzero(counts)}, seen))
    return found


def _sentence(eval_name: str, unseen: Mapping[str, int], seen: Mapping[str, str]) -> str:
    """The warning of classes with so many examples; `seen` are the plain and actual names of the trained classes."""
    total = sum(unseen.values())
    shown = next((name for name in unseen if _plain(name) in seen), next(iter(unseen)))
    verb, have = "is" if total == 1 else "are", "has" if len(unseen) == 1 else "have"
    classes = f"the class {shown!r}" if len(unseen) == 1 else f"{len(unseen)} classes, such as {shown!r}"
    hint = f"; did you mean {seen[_plain(shown)]!r}?" if _plain(shown) in seen else ""
    return (f"{total:,} example{'s' * (total > 1)} of the evaluation set {eval_name} {verb} of {classes}, which {have} "
            f"no training example{hint}")  # fmt: skip


def _plain(name: str) -> str:
    """A class name without case, form in Unicode, spaces around it and leading zeros."""
    return re.sub(r"^0+(?=\d)", "", unicodedata.normalize("NFC", name.strip().casefold()))

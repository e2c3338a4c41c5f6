"""The user's own images: a folder with a sub-folder per class, or with split folders `train/`, `test/`, … of these."""

import concurrent.futures
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from imgclf_jax.core import terminal
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.split_folders import class_folders, split_folders
from imgclf_jax.core.text import utf8
from imgclf_jax.data import image_files
from imgclf_jax.data.file_source import check_files, file_source, hashed, open_folder
from imgclf_jax.data.image_check import THREADS
from imgclf_jax.data.source import Source

log = logging.getLogger(__name__)


def folder(path: str, train_per_class: int = 0, draw: int = 0, *, unreadable: str = "error") -> dict[str, Source]:
    """Finds the images of a folder: `path/CLASS/…` is the split `train`, `path/test/CLASS/…` the split `test`.

    - `core.split_folders` names the split folders.
    - `train_per_class` makes so many images of each class `train` and all others `test`, in a folder without splits.
      Which ones depends on their names and the number `draw`, so several runs can have different splits.
    - `unreadable` "skip" drops the files that cannot be read, and "error" raises. They are found at the start: see
      `image_check`.

    The log counts files that are not images (see `image_files`) and images outside the class folders. Raises UserError
    naming the folder or file at fault.
    """
    root = open_folder("folder", path)
    if (absolute := root.resolve()) == absolute.parent:
        raise UserError(f"folder: {path!r} is the root of a file system, and listing it would read every file name on "
                        "the disk; name the folder that holds the class folders")  # fmt: skip
    prefixes = {name: f"{name}/" for name in split_folders(root)} or {"train": ""}
    split_roots = [root / prefix for prefix in prefixes.values()]
    # All splits have the union of their classes, so labels agree between them.
    class_names = tuple(sorted({utf8(d.name) for split_root in split_roots for d in class_folders(split_root)}))
    if len(class_names) < 2:
        raise UserError(f"folder: {root} has {len(class_names)} class folders; make one per class, at least two")
    strays: Counter[str] = Counter()
    with terminal.showing(f"listing images in {str(root)!r}"):
        listed = {name: _list(root, prefix, strays) for name, prefix in prefixes.items()}
    _log_unused(root, split_roots, strays)

    checked = check_files("folder", root, [file for files in listed.values() for file in files], unreadable)
    splits = {name: sorted((file for file in files if file in checked.digests), key=hashed)
              for name, files in listed.items()}  # fmt: skip
    if train_per_class:
        if splits.keys() != {"train"} or train_per_class < 0:
            raise UserError(f"folder(train_per_class={train_per_class}): must be above zero, for a folder without "
                            "train/ and test/")  # fmt: skip
        chosen = _choose(splits["train"], train_per_class, draw)
        splits["test"] = [file for file in splits["train"] if file not in chosen]
        splits["train"] = [file for file in splits["train"] if file in chosen]
    number = {name: label for label, name in enumerate(class_names)}
    out = {}
    for name, files in splits.items():
        prefix = prefixes.get(name, "")
        if not files:
            raise UserError(f"folder: {root / prefix} has no readable image; add some or remove it")
        labels = [number[utf8(file.removeprefix(prefix).partition("/")[0])] for file in files]
        bad = [file for file in checked.unreadable if file.startswith(prefix)]
        out[name] = file_source(root, files, np.array(labels, np.int32), class_names, checked, bad)
    return out


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


def _list(root: Path, prefix: str, strays: Counter[str]) -> list[str]:
    """Lists the images in the class folders of a split, relative to `root`, and counts other files."""
    folders, files = class_folders(root / prefix), []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for class_folder, (names, others) in zip(folders, pool.map(image_files.find, folders), strict=True):
            if not names:
                raise UserError(f"folder: the class folder {class_folder} has no images; add some or remove it")
            files += [f"{prefix}{class_folder.name}/{name}" for name in names]
            strays += others
    return files


def _log_unused(root: Path, split_roots: Iterable[Path], strays: Mapping[str, int]) -> None:
    """Logs what the folder holds but no split uses, in one line, with the `strays` of the class folders."""
    parents, strays = list(dict.fromkeys([root, *split_roots])), Counter(strays)
    used = {*parents, *(class_folder for split in split_roots for class_folder in class_folders(split))}
    images = sum(1 for parent in parents for _ in image_files.walk(parent, strays, recursive=False))
    parts = [f"the folder {folder.name}" for folder in class_folders(root) if folder not in used]
    if images:
        parts.append(f"{images} image{'s' * (images > 1)} outside the class folders")
    if strays:
        parts.append(image_files.describe_strays(strays))
    if parts:
        log.info("%s: not used: %s", root, ", ".join(parts))

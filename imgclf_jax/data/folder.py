"""The user's own images: a folder with a sub-folder per class, or with split folders `train/`, `test/`, … of these."""

import concurrent.futures
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from imgclf_jax.core import places, terminal
from imgclf_jax.core.errors import UserError, no_such, unknown
from imgclf_jax.core.split_folders import class_folders, split_folders
from imgclf_jax.core.text import utf8
from imgclf_jax.data import image_check, image_files
from imgclf_jax.data.decode import FORMATS
from imgclf_jax.data.file_source import LISTING, FileSource, report_unreadable
from imgclf_jax.data.image_files import Listing

log = logging.getLogger(__name__)


def folder(
    path: str, train_per_class: int = 0, draw: int = 0, *, unreadable: str = "error",
    formats: tuple[str, ...] = FORMATS,
) -> dict[str, FileSource]:  # fmt: skip
    """Finds the images of a folder: `path/CLASS/…` is the split `train`, `path/test/CLASS/…` the split `test`.

    - `core.split_folders` names the split folders.
    - `train_per_class` makes so many images of each class `train` and all others `test`, in a folder without splits.
      Which ones depends on their names and the number `draw`, so several runs can have different splits.
    - `unreadable` "skip" drops the files that cannot be read, and "error" raises. They are found at the start (see
      `image_check`), and all listed in one file.

    The log counts files that are not images (see `image_files`) and images outside the class folders. Raises UserError
    naming the folder or file at fault.
    """
    if unreadable not in ("error", "skip"):
        raise UserError(unknown("value of unreadable", unreadable, ("error", "skip")))
    root = places.expand_user(path)
    if places.in_bucket(root):
        raise UserError(f"folder: {path!r} is in a bucket, where many small files are slow to read; mount it as a "
                        "folder (gcsfuse, mountpoint-s3), or use arrays(…) or a TFDS data set there")  # fmt: skip
    if not root.is_dir():
        raise no_such("folder", "directory", root)
    if (absolute := root.resolve()) == absolute.parent:
        raise UserError(f"folder: {path!r} is the root of a file system, and listing it would read every file name on "
                        "the disk; name the folder that holds the class folders")  # fmt: skip
    split_roots = {name: root / name for name in split_folders(root)} or {"train": root}
    # All splits have the union of their classes, so labels agree between them.
    class_names = tuple(sorted({utf8(d.name) for split in split_roots.values() for d in class_folders(split)}))
    if len(class_names) < 2:
        raise UserError(f"folder: {root} has {len(class_names)} class folders; make one per class, at least two")
    scans = {name: _scan(split_root, class_names) for name, split_root in split_roots.items()}
    sources, listings = zip(*scans.values(), strict=True)
    _log_unused(root, sources, sum((listing.strays for listing in listings), Counter()))
    out = _check_readable(root, scans, unreadable, formats)
    return _split_per_class(out, train_per_class, draw) if train_per_class else out


def _check_readable(
    root: Path, scans: dict[str, tuple[FileSource, Listing]], unreadable: str, formats: tuple[str, ...]
) -> dict[str, FileSource]:
    """The sources without unreadable files. Raises UserError naming these unless `unreadable` is "skip"."""
    bad, sources = {}, {}
    for name, (source, listing) in scans.items():
        checked = image_check.check(source.root, listing.images, unreadable == "skip", formats)
        bad[name] = listing.broken | checked.unreadable
        sources[name] = replace(source, digests=tuple(checked.digests.get(file, "") for file in source.files))
    reasons = {str(scans[name][0].root / file): reason for name in bad for file, reason in bad[name].items()}
    if not reasons:
        return sources
    report_unreadable("folder", root, reasons, unreadable)
    return {name: _without(source, bad[name]) for name, source in sources.items()}


def _without(source: FileSource, bad: dict[str, str]) -> FileSource:
    """The source without these files. Raises UserError if a class folder loses all its images."""
    kept = source.without(bad)
    classes = {file.partition("/")[0] for file in kept.files}
    if gone := sorted({file.partition("/")[0] for file in bad} - classes):
        raise UserError(f"folder: the class folder {source.root / gone[0]} has no readable image; add some or "
                        "remove it")  # fmt: skip
    return kept


def _split_per_class(splits: dict[str, FileSource], train_per_class: int, draw: int) -> dict[str, FileSource]:
    """Splits the only split, `train`, into `train` and `test`."""
    source = splits["train"] if splits.keys() == {"train"} else None
    if source is None or train_per_class < 0:
        raise UserError(
            f"folder(train_per_class={train_per_class}): must be above zero, for a folder without train/ and test/"
        )
    assert source.labels is not None
    chosen = np.zeros(len(source), bool)
    for label, name in enumerate(source.class_names):
        indices = np.flatnonzero(source.labels == label)
        if len(indices) <= train_per_class:
            raise UserError(
                f"folder(train_per_class={train_per_class}): the class {name!r} has {len(indices)} images, which "
                "leaves none for `test`; take fewer, or remove the class"
            )
        keys = [hashlib.sha256(os.fsencode(f"{draw}/{source.files[i]}")).digest() for i in indices]
        chosen[indices[sorted(range(len(indices)), key=keys.__getitem__)[:train_per_class]]] = True

    return {"train": source.select(np.flatnonzero(chosen)), "test": source.select(np.flatnonzero(~chosen))}


def _scan(root: Path, class_names: tuple[str, ...]) -> tuple[FileSource, Listing]:
    """Lists the class folders of a split, without opening an image."""
    merged = Listing()
    folders = class_folders(root)
    with terminal.showing(f"listing images in {str(root)!r}"), concurrent.futures.ThreadPoolExecutor(LISTING) as pool:
        listings = list(pool.map(image_files.find, folders))
    for class_folder, listing in zip(folders, listings, strict=True):
        if not listing.images and not listing.broken:
            raise UserError(f"folder: the class folder {class_folder} has no images; add some or remove it")
        merged.images |= {f"{class_folder.name}/{name}": stamp for name, stamp in listing.images.items()}
        merged.broken |= {f"{class_folder.name}/{name}": reason for name, reason in listing.broken.items()}
        merged.strays += listing.strays
    files = tuple(sorted(merged.images, key=lambda file: hashlib.sha256(os.fsencode(file)).digest()))
    number = {name: label for label, name in enumerate(class_names)}
    labels = np.array([number[utf8(file.partition("/")[0])] for file in files], np.int32)
    return FileSource(root, files, labels, tuple(merged.images[file][0] for file in files), class_names), merged


def _log_unused(root: Path, splits: Iterable[FileSource], strays: Counter[str]) -> None:
    """Logs what the folder holds but no split uses, in one line; adds files outside the class folders to `strays`."""
    parents = list(dict.fromkeys([root, *(source.root for source in splits)]))
    used = {*parents, *(class_folder for source in splits for class_folder in class_folders(source.root))}
    images = sum(1 for parent in parents for _ in image_files.walk(parent, strays, recursive=False))
    parts = [f"the folder {folder.name}" for folder in class_folders(root) if folder not in used]
    if images:
        parts.append(f"{images} image{'s' * (images > 1)} outside the class folders")
    if strays:
        parts.append(image_files.describe_strays(strays))
    if parts:
        log.info("%s: not used: %s", root, ", ".join(parts))

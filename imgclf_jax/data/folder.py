"""The user's own images: one sub-folder a class, or `train/`, `test/`, … of those."""

import concurrent.futures
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from imgclf_jax.core import places
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.split_folders import class_folders, split_folders
from imgclf_jax.core.text import utf8
from imgclf_jax.data import image_check, image_files
from imgclf_jax.data.decode import FORMATS
from imgclf_jax.data.file_source import LISTING, FileSource, name_unreadable
from imgclf_jax.data.image_files import Found
from imgclf_jax.run import terminal

log = logging.getLogger(__name__)


def folder(
    path: str,
    train_per_class: int = 0,
    draw: int = 0,
    *,
    unreadable: str = "error",
    formats: tuple[str, ...] = FORMATS,
    host_ops: tuple[str, ...] = (),
) -> dict[str, FileSource]:
    """Images under `path`: `path/CLASS/…` is the split `train`; `path/train/CLASS/…` and `path/test/CLASS/…` are two.

    Split folders are called as `core.split_folders` says. With `train_per_class`, so many images of each class of a
    folder without splits are `train`, and all others `test`; which ones follows from their names and the number `draw`,
    for splits of their own for several runs.

    Files that cannot be read, or that one of the specs `host_ops` refuses for their size, are found at the start, see
    `image_check`, and all listed in one file. With `unreadable`
    "skip" they are left out, and what the source holds follows from the files that are left. What is no image, see
    `image_files`, and what lies outside of the class folders is counted in the log.
    Raises UserError naming the folder or file at fault.
    """
    if unreadable not in ("error", "skip"):
        raise UserError(unknown("value of unreadable", unreadable, ("error", "skip")))
    root = places.as_path(path).expanduser()
    if places.in_bucket(root):
        raise UserError(f"folder: {path!r} is in a bucket, where many small files are slow to read; mount it as a "
                        "folder (gcsfuse, mountpoint-s3), or use arrays(…) or a TFDS data set there")  # fmt: skip
    if not root.is_dir():
        raise UserError(f"folder: there is no directory {str(root)!r} (working directory: {Path.cwd()})")
    if (absolute := root.resolve()) == absolute.parent:
        raise UserError(f"folder: {path!r} is the root of a file system, and listing it would read every file name on "
                        "the disk; name the folder that holds the class folders")  # fmt: skip
    split_roots = {name: root / name for name in split_folders(root)} or {"train": root}
    # The classes of every split are those of the union, so that labels agree between splits.
    class_names = tuple(sorted({utf8(d.name) for split in split_roots.values() for d in class_folders(split)}))
    if len(class_names) < 2:
        raise UserError(f"folder: {root} holds {len(class_names)} class folders; expected at least two, one a class")
    scans = {name: _scan(split_root, class_names) for name, split_root in split_roots.items()}
    sources, found = zip(*scans.values(), strict=True)
    _log_passed_over(root, sources, sum((f.strays for f in found), Counter()))
    out = _readable(root, scans, unreadable, formats, host_ops)
    return _few(out, train_per_class, draw) if train_per_class else out


def _readable(
    root: Path,
    scans: dict[str, tuple[FileSource, Found]],
    unreadable: str,
    formats: tuple[str, ...],
    host_ops: tuple[str, ...],
) -> dict[str, FileSource]:
    """The sources without unreadable files; UserError names these unless `unreadable` is "skip"."""
    bad, sources = {}, {}
    for name, (source, found) in scans.items():
        checked = image_check.check(source.root, found.images, unreadable == "skip", formats, host_ops)
        bad[name] = found.lost | checked.unreadable
        sources[name] = replace(source, digests=tuple(checked.digests.get(file, "") for file in source.files))
    reasons = {str(scans[name][0].root / file): reason for name in bad for file, reason in bad[name].items()}
    if not reasons:
        return sources
    name_unreadable("folder", root, reasons, unreadable)
    return {name: _without(source, bad[name]) for name, source in sources.items()}


def _without(source: FileSource, bad: dict[str, str]) -> FileSource:
    """The source without these files. Raises UserError where nothing is left of a class folder."""
    kept = source.without(bad)
    classes = {file.partition("/")[0] for file in kept.files}
    if gone := sorted({file.partition("/")[0] for file in bad} - classes):
        raise UserError(f"folder: the class folder {source.root / gone[0]} holds no readable image; add some or "
                        "remove it")  # fmt: skip
    return kept


def _few(splits: dict[str, FileSource], train_per_class: int, draw: int) -> dict[str, FileSource]:
    """The split `train` of one without a test split, cut into `train` and `test`."""
    source = splits["train"] if splits.keys() == {"train"} else None
    if source is None or train_per_class < 0:
        raise UserError(
            f"folder(train_per_class={train_per_class}) is a number above zero, for a folder without train/ and test/"
        )
    assert source.labels is not None
    chosen = np.zeros(len(source), bool)
    for label, name in enumerate(source.class_names):
        places = np.flatnonzero(source.labels == label)
        if len(places) <= train_per_class:
            raise UserError(
                f"folder(train_per_class={train_per_class}): the class {name!r} has {len(places)} images, and none "
                "would be left for `test`; take fewer, or remove the class"
            )
        keys = [hashlib.sha256(os.fsencode(f"{draw}/{source.files[i]}")).digest() for i in places]
        chosen[places[sorted(range(len(places)), key=keys.__getitem__)[:train_per_class]]] = True

    return {"train": source.select(np.flatnonzero(chosen)), "test": source.select(np.flatnonzero(~chosen))}


def _scan(root: Path, class_names: tuple[str, ...]) -> tuple[FileSource, Found]:
    """The images of a split's folder, before any is opened, and all that was found beside them."""
    whole = Found()
    folders = class_folders(root)
    found_in = [Found() for _ in folders]

    def progress() -> str:
        return f"listing images in {str(root)!r}: {sum(found.count() for found in found_in):,} files so far"

    with (
        terminal.busy(f"listing {root}"),
        terminal.log_progress(progress),
        concurrent.futures.ThreadPoolExecutor(LISTING) as pool,
    ):
        results = list(pool.map(image_files.find, folders, found_in))
    for class_folder, found in zip(folders, results, strict=True):
        if not found.images and not found.lost:
            raise UserError(f"folder: the class folder {class_folder} holds no images; add some or remove it")
        whole.images |= {f"{class_folder.name}/{name}": stamp for name, stamp in found.images.items()}
        whole.lost |= {f"{class_folder.name}/{name}": reason for name, reason in found.lost.items()}
        whole.strays += found.strays
    files = tuple(sorted(whole.images, key=lambda file: hashlib.sha256(os.fsencode(file)).digest()))
    number = {name: label for label, name in enumerate(class_names)}
    labels = np.array([number[utf8(file.partition("/")[0])] for file in files], np.int32)
    return FileSource(root, files, labels, tuple(whole.images[file][0] for file in files), class_names), whole


def _log_passed_over(root: Path, splits: Iterable[FileSource], strays: Counter[str]) -> None:
    """Says in one line what lies in the folder and is not used."""
    places = list(dict.fromkeys([root, *(source.root for source in splits)]))
    used = {*places, *(class_folder for source in splits for class_folder in class_folders(source.root))}
    loose = image_files.beside(places)
    parts = [f"the folder {folder.name}" for folder in class_folders(root) if folder not in used]
    if images := len(loose.images) + len(loose.lost):
        parts.append(f"{images} image{'s' * (images > 1)} outside of the class folders")
    if counted := image_files.counted(strays + loose.strays):
        parts.append(counted)
    if parts:
        log.info("%s: not used: %s", root, ", ".join(parts))

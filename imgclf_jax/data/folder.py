"""The user's own images: a folder with a sub-folder per class, or with split folders `train/`, `test/`, … of these."""

import concurrent.futures
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from imgclf_jax.core import paths, terminal
from imgclf_jax.core.errors import UserError, no_such, unknown
from imgclf_jax.core.split_folders import class_folders, split_folders
from imgclf_jax.core.text import utf8
from imgclf_jax.data import image_check, image_files
from imgclf_jax.data.decode import FORMATS
from imgclf_jax.data.file_source import LISTING, file_source, hashed, report_unreadable
from imgclf_jax.data.image_files import Listing
from imgclf_jax.data.source import Source

log = logging.getLogger(__name__)


def folder(
    path: str, train_per_class: int = 0, draw: int = 0, *, unreadable: str = "error", formats: tuple[str, ...] = FORMATS
) -> dict[str, Source]:
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
    root = paths.expand_user(path)
    if paths.in_bucket(root):
        raise UserError(f"folder: {path!r} is in a bucket, where many small files are slow to read; mount it as a "
                        "folder (gcsfuse, mountpoint-s3), or use arrays(…) or a TFDS data set there")  # fmt: skip
    if not root.is_dir():
        raise no_such("folder", "directory", root)
    if (absolute := root.resolve()) == absolute.parent:
        raise UserError(f"folder: {path!r} is the root of a file system, and listing it would read every file name on "
                        "the disk; name the folder that holds the class folders")  # fmt: skip
    roots = {name: root / name for name in split_folders(root)} or {"train": root}
    # All splits have the union of their classes, so labels agree between them.
    class_names = tuple(sorted({utf8(d.name) for split in roots.values() for d in class_folders(split)}))
    if len(class_names) < 2:
        raise UserError(f"folder: {root} has {len(class_names)} class folders; make one per class, at least two")
    listings = {name: _list(split_root) for name, split_root in roots.items()}
    _log_unused(root, roots.values(), sum((listing.strays for listing in listings.values()), Counter()))

    bad, digests = {}, {}
    for name, listing in listings.items():
        checked = image_check.check(roots[name], listing.images, unreadable == "skip", formats)
        bad[name], digests[name] = listing.broken | checked.unreadable, checked.digests
    if reasons := {str(roots[name] / file): reason for name in bad for file, reason in bad[name].items()}:
        report_unreadable("folder", root, reasons, unreadable)
    number = {name: label for label, name in enumerate(class_names)}

    def source(split: str, files: Sequence[str]) -> Source:
        labels = np.array([number[utf8(file.partition("/")[0])] for file in files], np.int32)
        return file_source(roots[split], files, labels, class_names, digests[split], tuple(bad[split]))

    for name, found in digests.items():
        if gone := sorted({file.partition("/")[0] for file in bad[name]} - {file.partition("/")[0] for file in found}):
            raise UserError(f"folder: the class folder {roots[name] / gone[0]} has no readable image; add some or "
                            "remove it")  # fmt: skip
    out = {name: sorted(found, key=hashed) for name, found in digests.items()}
    if not train_per_class:
        return {name: source(name, files) for name, files in out.items()}
    if out.keys() != {"train"} or train_per_class < 0:
        raise UserError(
            f"folder(train_per_class={train_per_class}): must be above zero, for a folder without train/ and test/"
        )
    chosen = _choose(out["train"], train_per_class, draw)
    return {"train": source("train", [file for file in out["train"] if file in chosen]),
            "test": source("train", [file for file in out["train"] if file not in chosen])}  # fmt: skip


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


def _list(root: Path) -> Listing:
    """Lists the class folders of a split, without opening an image."""
    folders = class_folders(root)
    with terminal.showing(f"listing images in {str(root)!r}"), concurrent.futures.ThreadPoolExecutor(LISTING) as pool:
        listings = list(pool.map(image_files.find, folders))
    merged = Listing()
    for class_folder, listing in zip(folders, listings, strict=True):
        if not listing.images and not listing.broken:
            raise UserError(f"folder: the class folder {class_folder} has no images; add some or remove it")
        merged.images |= {f"{class_folder.name}/{name}": stamp for name, stamp in listing.images.items()}
        merged.broken |= {f"{class_folder.name}/{name}": reason for name, reason in listing.broken.items()}
        merged.strays += listing.strays
    return merged


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

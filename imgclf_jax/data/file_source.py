"""Sources of image files, for `folder` and `table`."""

import concurrent.futures
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError, check_choice, no_such
from imgclf_jax.core.split_folders import split_order
from imgclf_jax.core.typing import Examples
from imgclf_jax.data import image_check
from imgclf_jax.data.image_check import Checked
from imgclf_jax.data.source import Source

log = logging.getLogger(__name__)

_readers = concurrent.futures.ThreadPoolExecutor(image_check.THREADS, "read-files")


def file_sources(
    root: Path, files: Sequence[str], splits: Sequence[str], labels: np.ndarray, class_names: tuple[str, ...],
    checked: Checked, columns: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, Source]:  # fmt: skip
    """The sources of the readable ones of these files, by the split of each: train, val and test first.

    The files are relative to `root` or absolute, `labels` i32[n], or targets f32[n, k]. Examples are in the order of a
    hash of their files; fingerprints cover names, contents, classes and labels. Raises UserError for an empty split.
    """
    skipped, out = tuple(str(root / file) for file in checked.unreadable), {}
    for split in sorted(set(splits), key=split_order):
        rows = [row for row, other in enumerate(splits) if other == split and files[row] in checked.digests]
        if not rows:
            raise UserError(f"{root}: the split {split!r} has no readable image; add some, or remove the split")
        rows.sort(key=lambda row: (hashed(files[row]), row))
        own, y = [files[row] for row in rows], labels[rows]
        facts = json.dumps([own, class_names, [checked.digests[file] for file in own]])
        fingerprint = hashlib.sha256(facts.encode() + np.ascontiguousarray(y).tobytes()).hexdigest()
        names = [str(root / file) for file in own]
        own_columns = {name: [values[row] for row in rows] for name, values in columns.items()}
        out[split] = Source(len(own), functools.partial(_read, names), class_names, fingerprint, y, names.__getitem__,
                            own_columns, skipped, checked.bits)  # fmt: skip
    return out


def _read(files: Sequence[str], ids: np.ndarray) -> Examples:
    return {"image": list(_readers.map(lambda i: paths.read(Path(files[i])), ids))}


def hashed(file: str) -> bytes:
    """The sort key of files: any slice then has examples of all classes."""
    return hashlib.sha256(file.encode(errors="surrogateescape")).digest()


def open_folder(kind: str, path: str) -> Path:
    """The folder of image files at `path`. Raises UserError naming the source `kind` if there is none."""
    root = paths.as_path(path)
    if paths.in_bucket(root):
        raise UserError(f"{kind}: {path!r} is in a bucket, where many small files are slow to read; mount it as a "
                        "folder (gcsfuse, mountpoint-s3), or use arrays(…) or a TFDS data set there")  # fmt: skip
    if not root.is_dir():
        raise no_such(kind, "directory", path)
    return root


def check_files(kind: str, root: Path, files: Sequence[str], unreadable: str) -> Checked:
    """Checks the image files of a source: see `image_check.check`.

    Raises UserError naming the first unreadable ones, or warns of their number if `unreadable` is "skip". Also warns of
    images of 16 or 32 bits that hold smaller values.
    """
    check_choice("value of unreadable", unreadable, ("error", "skip"))
    checked = image_check.check(root, files)
    bad = checked.unreadable
    if bad and unreadable == "error":
        shown = "; ".join(f"{root / file} ({reason})" for file, reason in list(bad.items())[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(f"{kind}: unreadable image: {shown}{more}; repair, move or remove it, or skip all such files "
                        "by --config.data.unreadable=skip, which the run then keeps")  # fmt: skip
    if bad:
        log.warning("%s: unreadable files left out: %d, such as %s", root, len(bad), root / next(iter(bad)))
    if checked.bits != 16:
        log.warning("%s: its grey images of more than 8 bits hold values of up to %d bits, which are scaled to 8", root,
                    checked.bits)  # fmt: skip
    return checked

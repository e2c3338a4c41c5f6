"""Sources of image files, for `folder` and `table`."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError, no_such, unknown
from imgclf_jax.core.text import utf8
from imgclf_jax.core.typing import Examples
from imgclf_jax.data import image_check
from imgclf_jax.data.image_check import Checked
from imgclf_jax.data.source import Source

log = logging.getLogger(__name__)


def file_source(
    root: Path, files: Sequence[str], labels: np.ndarray, class_names: tuple[str, ...], checked: Checked,
    skipped: Sequence[str] = (), columns: Mapping[str, Sequence[Any]] | None = None,
) -> Source:  # fmt: skip
    """The source of these files, relative to `root` or absolute.

    `labels` are i32[n], or targets f32[n, k]. The fingerprint covers names, contents, classes and labels.
    """

    def read(ids: np.ndarray) -> Examples:
        return {"image": [paths.read(root / files[i]) for i in ids]}

    facts = json.dumps([[utf8(file) for file in files], class_names, [checked.digests[file] for file in files]])
    fingerprint = hashlib.sha256(facts.encode() + np.ascontiguousarray(labels).tobytes()).hexdigest()
    return Source(
        len(files), read, class_names, fingerprint, labels, lambda i: str(root / files[i]), columns or {},
        tuple(utf8(str(root / file)) for file in sorted(skipped)), thread_safe=True,
    )  # fmt: skip


def hashed(file: str) -> bytes:
    """The sort key of files: any slice then has examples of all classes."""
    return hashlib.sha256(file.encode(errors="surrogateescape")).digest()


def open_folder(kind: str, path: str) -> Path:
    """The folder of image files at `path`. Raises UserError naming the source `kind` if there is none."""
    root = paths.expand_user(path)
    if paths.in_bucket(root):
        raise UserError(f"{kind}: {path!r} is in a bucket, where many small files are slow to read; mount it as a "
                        "folder (gcsfuse, mountpoint-s3), or use arrays(…) or a TFDS data set there")  # fmt: skip
    if not root.is_dir():
        raise no_such(kind, "directory", path)
    return root


def check_files(kind: str, root: Path, files: Sequence[str], unreadable: str, key: Path | None = None) -> Checked:
    """Checks the image files of a source: see `image_check.check`.

    Raises UserError naming the first unreadable ones, or warns of their number if `unreadable` is "skip".
    """
    if unreadable not in ("error", "skip"):
        raise UserError(unknown("value of unreadable", unreadable, ("error", "skip")))
    checked = image_check.check(root, files, unreadable == "skip", key)
    bad = checked.unreadable
    if bad and unreadable == "error":
        shown = "; ".join(f"{root / file} ({reason})" for file, reason in list(bad.items())[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(f"{kind}: unreadable image: {shown}{more}; repair, move or remove it, or skip all such files "
                        "by --config.data.unreadable=skip")  # fmt: skip
    if bad:
        log.warning("%s: unreadable files left out: %d, such as %s", key or root, len(bad), root / next(iter(bad)))
    return checked

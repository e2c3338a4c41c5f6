"""Sources of image files, for `folder` and `table`."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable, utf8
from imgclf_jax.core.typing import Examples
from imgclf_jax.data import image_check
from imgclf_jax.data.source import Source

log = logging.getLogger(__name__)

LISTING = 16  # concurrent file system requests: a network file system is slow for each, but serves many at a time


def file_source(
    root: Path, files: Sequence[str], labels: np.ndarray, class_names: tuple[str, ...], digests: Mapping[str, str],
    skipped: Sequence[str] = (), columns: Mapping[str, Sequence[Any]] | None = None,
) -> Source:  # fmt: skip
    """The source of these files, relative to `root` or absolute.

    `labels` are i32[n], or targets f32[n, k]. `digests` of the contents by file make the fingerprint, with the names,
    the classes and the labels.
    """

    def read(ids: np.ndarray) -> Examples:
        return {"image": [paths.read(root / files[i]) for i in ids]}

    facts = json.dumps([[utf8(file) for file in files], class_names, [digests[file] for file in files]])
    fingerprint = hashlib.sha256(facts.encode() + np.ascontiguousarray(labels).tobytes()).hexdigest()
    return Source(
        len(files), read, class_names, fingerprint, labels, lambda i: str(root / files[i]), columns or {},
        tuple(utf8(str(root / file)) for file in sorted(skipped)), thread_safe=True,
    )  # fmt: skip


def hashed(file: str) -> bytes:
    """The sort key of files: any slice then has examples of all classes."""
    return hashlib.sha256(file.encode(errors="surrogateescape")).digest()


def report_unreadable(kind: str, path: Path, reasons: Mapping[str, str], unreadable: str) -> None:
    """Raises UserError naming the files in {path: reason}, or warns of them if `unreadable` is "skip".

    Writes the full list to the cache folder. `kind` is the source's name in a config, `path` what it reads.
    """
    file = image_check.write_list(f"{printable(path.resolve().name)}-{image_check.identity(path)[:8]}", reasons)
    listed = f"all are listed in {file}" if file else "the cache folder is not writable, so no file lists them"
    if unreadable == "error":
        shown = "; ".join(f"{file} ({reason})" for file, reason in sorted(reasons.items())[:3])
        more = f" and {len(reasons) - 3} more; {listed}" if len(reasons) > 3 else ""
        raise UserError(f"{kind}: unreadable image: {shown}{more}; repair, move or remove it, or skip all such files "
                        "by --config.data.unreadable=skip")  # fmt: skip
    log.warning("%s: unreadable files left out: %d; %s", path, len(reasons), listed)

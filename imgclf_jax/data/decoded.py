"""Decoded sets kept in the user's cache folder, so that the next run need not read and decode its images again.

Only of sources that say `immutable`: those whose fingerprint, or `stamp`, changes if any of their examples does.
"""

import contextlib
import hashlib
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from imgclf_jax.run import cache

_KEEP_BYTES = 4 << 30  # of all sets together; the ones used longest ago are removed
_FORM = 1  # to be raised when `decode` gives other pixels than before


def _kept(source: Any, preprocess: str) -> bool:
    return getattr(source, "immutable", False) and ":" not in preprocess  # a user's own op may change


def _file(source: Any, preprocess: str) -> Path:
    identity = repr((source.fingerprint(), getattr(source, "stamp", ""), preprocess, PIL.__version__, _FORM))
    return cache.folder("decoded") / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"


def load(source: Any, preprocess: str, y_name: str = "label") -> tuple[np.ndarray, np.ndarray] | None:
    """(images uint8[n, h, w, c], y) that `save` kept; None where there are none, or damaged ones.

    y is labels i32[n] for `y_name` "label", targets f32[n, k] for "target".
    """
    if not _kept(source, preprocess):
        return None
    file = _file(source, preprocess)
    try:
        with file.open("rb") as stream, np.load(stream) as content:  # checks a CRC
            images, y = content["images"], content[f"{y_name}s"]
        os.utime(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return (images, y) if len(images) == len(y) == len(source) else None


def save(source: Any, preprocess: str, images: np.ndarray, y_name: str, y: np.ndarray) -> None:
    """Keeps a decoded set, if its source is immutable and the disk has the space."""
    if not _kept(source, preprocess):
        return
    file = _file(source, preprocess)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as directory:
            temporary = Path(directory) / file.name
            arrays: dict[str, Any] = {"images": images, f"{y_name}s": y}
            np.savez(temporary, **arrays)
            os.replace(temporary, file)
        files = sorted(file.parent.glob("*.npz"), key=lambda f: f.stat().st_mtime)
        excess = sum(f.stat().st_size for f in files) - _KEEP_BYTES
        for old in files[:-1]:
            if excess <= 0:
                break
            excess -= old.stat().st_size
            old.unlink()

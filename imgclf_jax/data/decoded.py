"""A cache of decoded data sets in the user's cache folder, which saves the next run reading and decoding them.

It serves only sources that declare `immutable`: any change of an example changes their fingerprint or `stamp`.
"""

import contextlib
import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import PIL

from imgclf_jax.core import cache, places
from imgclf_jax.data.sources import Source

_KEEP_BYTES = 4 << 30  # of all sets; the least recently used are removed
_FORM = 1  # increase it when `decode` returns other pixels than before


def _is_cacheable(source: Source, preprocess: str) -> bool:
    return getattr(source, "immutable", False) and ":" not in preprocess  # a user's own op may change


def _file(source: Source, preprocess: str) -> Path:
    identity = repr((source.fingerprint(), getattr(source, "stamp", ""), preprocess, PIL.__version__, _FORM))
    return cache.folder("decoded") / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"


def load(source: Source, preprocess: str, y_name: str = "label") -> tuple[np.ndarray, np.ndarray] | None:
    """Loads (images uint8[n, h, w, c], y) that `save` cached; None if they are missing or damaged.

    y is labels i32[n] for `y_name` "label", targets f32[n, k] for "target".
    """
    if not _is_cacheable(source, preprocess):
        return None
    file = _file(source, preprocess)
    try:
        with places.open_regular(file) as stream, np.load(stream) as content:  # which checks the CRC
            images, y = content["images"], content[f"{y_name}s"]
        os.utime(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return (images, y) if len(images) == len(y) == len(source) else None


def save(source: Source, preprocess: str, images: np.ndarray, y_name: str, y: np.ndarray) -> None:
    """Caches a decoded set, if its source is immutable and the disk has space."""
    if not _is_cacheable(source, preprocess):
        return
    file = _file(source, preprocess)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with places.replacing(file) as out:
            np.savez(out, allow_pickle=False, **{"images": images, f"{y_name}s": y})
        files = sorted(file.parent.glob("*.npz"), key=lambda f: f.stat().st_mtime)
        excess = sum(f.stat().st_size for f in files) - _KEEP_BYTES
        for old in files[:-1]:
            if excess <= 0:
                break
            excess -= old.stat().st_size
            old.unlink()

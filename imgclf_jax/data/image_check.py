"""Decodes all image files before training begins, finds unreadable ones, and remembers the results."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import PIL

from imgclf_jax.core import paths, terminal
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode
from imgclf_jax.data.read_ahead import map_ahead

_FORM = 9  # increase it when `decode` refuses other files than before, or the record changes
THREADS = 16  # a network file system is slow for each request, but serves many at a time
_AHEAD = 1024  # files: a million tasks at once would take more memory than their results

# Size in bytes, mtime and ctime in nanoseconds. The ctime reveals a replaced file whose mtime `cp -p` preserved.
type Stamp = tuple[int, int, int]
_NO_STAMP = (0, 0, 0)  # of missing files, and of those with a read error, which may be transient


class Checked(NamedTuple):
    """The result of a check."""

    unreadable: dict[str, str]  # name → the reason; sorted
    digests: dict[str, str]  # name → 32 hex digits of the contents, for readable files
    bits: int  # of the greatest value of readable grey images of more than 8 bits; 16 without any


class _Entry(NamedTuple):
    """The result for a file."""

    stamp: Stamp
    reason: str  # why it is unreadable; "" if readable
    digest: str = ""
    bits: int = 0


def check(root: Path, files: Sequence[str]) -> Checked:
    """Finds the files in `root` that are not readable images, and digests the others (SHA-256).

    Results are remembered by size and change times in the user's cache folder.
    """
    stamps = dict(map_ahead(lambda name: (name, _stamp(root / name)), files, THREADS, _AHEAD))
    decoder = f" {PIL.__version__} {_FORM} {decode.FORMATS}".encode()
    name = hashlib.sha256(os.fsencode(root.resolve()) + decoder).hexdigest()[:32]
    record = paths.cache_folder("checked") / f"{name}.json"
    known = _load(record)
    entries = {name: known[name] for name, stamp in stamps.items()
               if name in known and known[name].stamp == stamp != _NO_STAMP}  # fmt: skip
    todo = [name for name in stamps if name not in entries]
    results = map_ahead(lambda name: (name, _check(root / name, stamps[name])), todo, THREADS, _AHEAD)
    try:
        entries |= terminal.track(results, len(todo), f"checking {root.name}")
    finally:
        if todo:
            with contextlib.suppress(OSError):  # without this record the next start checks again
                record.parent.mkdir(parents=True, exist_ok=True)
                paths.write_atomically(record, json.dumps(known | entries))
    reasons = {name: entry.reason for name, entry in entries.items() if entry.reason}
    digests = {name: entry.digest for name, entry in entries.items() if not entry.reason}
    return Checked(dict(sorted(reasons.items())), digests, max((one.bits for one in entries.values()), default=0) or 16)


def _stamp(file: Path) -> Stamp:
    try:
        status = os.stat(file)
    except (OSError, ValueError):  # `_check` tells why
        return _NO_STAMP
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _check(file: Path, stamp: Stamp) -> _Entry:
    try:
        data = decode.read_file(file)
        return _Entry(stamp, "", hashlib.sha256(data).hexdigest()[:32], decode.measure(data))
    except UserError as e:
        return _Entry(stamp, str(e))
    except (OSError, ValueError) as e:
        return _Entry(_NO_STAMP, getattr(e, "strerror", None) or str(e))


def _load(record: Path) -> dict[str, _Entry]:
    """Loads what `check` has recorded; {} if it is damaged."""
    try:
        return {name: _Entry(tuple(stamp), *rest) for name, (stamp, *rest) in json.loads(paths.read(record)).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}

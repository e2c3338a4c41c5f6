"""Finds unreadable image files before training begins, and remembers the results."""

import concurrent.futures
import hashlib
import itertools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import PIL

from imgclf_jax.core import cache, paths, terminal
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable
from imgclf_jax.core.typing import Json
from imgclf_jax.data import decode
from imgclf_jax.data.image_files import Stamp

_MAX_DECODED = 256 << 20  # bytes of files that are always decoded, in some seconds
_SAVE_SECONDS = 60.0  # the work that a killed process may lose
_FORM = 6  # increase it when `decode` refuses other files than before, or the record changes


class Checked(NamedTuple):
    """The result of a check."""

    unreadable: dict[str, str]  # name → the reason; sorted
    digests: dict[str, str]  # name → 32 hex digits of the contents, for readable files


class _Entry(NamedTuple):
    """The result for a file."""

    stamp: Stamp
    decoded: bool  # whether all pixels were decoded, not only the header
    reason: str  # why it is unreadable; "" if readable
    digest: str = ""


def check(
    root: Path, stamps: Mapping[str, Stamp], decode_all: bool = False, formats: tuple[str, ...] = decode.FORMATS,
    key: Path | None = None,
) -> Checked:  # fmt: skip
    """Finds the files in `root` that are not readable images in one of the formats, and digests the others (SHA-256).

    It decodes every file with `decode_all` or if all have less than 256 MiB together. Otherwise it reads only the
    headers, and a damaged image is named when training reaches it. Results are remembered by size and change times in
    the user's cache folder, for `root` or for the table `key` of the files.
    """
    deep = decode_all or sum(size for size, *_ in stamps.values()) < _MAX_DECODED
    record = cache.folder("checked") / f"{identity(key or root)}.json"
    known = _load(record, formats)
    entries = {name: entry for name, stamp in stamps.items()
               if (entry := known.get(name)) and entry.stamp == stamp
               and (entry.reason or entry.decoded or not deep)}  # fmt: skip
    todo = [name for name in stamps if name not in entries]
    saved = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        # Parts, since a million tasks would take more memory than their results.
        parts = (pool.map(lambda name: _check(root / name, stamps[name], deep, formats), names)
                 for names in itertools.batched(todo, 1024))  # fmt: skip
        results = zip(todo, itertools.chain.from_iterable(parts), strict=True)
        for name, entry in terminal.track(results, len(todo), f"checking {(key or root).name}"):
            entries[name] = entry
            if time.monotonic() - saved > _SAVE_SECONDS:
                _save(record, entries, formats)
                saved = time.monotonic()
    if todo:
        _save(record, entries, formats)
    reasons = {name: entry.reason for name, entry in sorted(entries.items()) if entry.reason}
    return Checked(reasons, {name: entry.digest for name, entry in entries.items() if not entry.reason})


def _check(file: Path, stamp: Stamp, deep: bool, formats: tuple[str, ...]) -> _Entry:
    try:
        data = decode.read_file(file)
        decode.decode(data, formats=formats) if deep else decode.check_header(data, formats)
        return _Entry(stamp, deep, "", hashlib.sha256(data).hexdigest()[:32])
    except OSError as e:  # permissions or a failing disk, which may be transient: no file has this stamp
        return _Entry((0, 0, 0), False, e.strerror or str(e))
    except UserError as e:
        return _Entry(stamp, deep, str(e))


def identity(folder: Path) -> str:
    """The name of a folder in the cache, 32 hex digits."""
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]


def readable(file: Path, preprocess: str) -> bool:
    """Whether the image file can be read, and decoded by the first op of a spec."""
    try:
        decode.decoder(preprocess)(decode.read_file(file))
    except (OSError, UserError):
        return False
    return True


def write_list(name: str, reasons: Mapping[str, str]) -> Path | None:
    """Writes a line for each file of {path: reason} to the cache folder. Returns the list, or None on failure."""
    file = cache.folder("unreadable") / f"{name}.txt"
    lines = [f"{printable(path)}\t{printable(reason)}\n" for path, reason in sorted(reasons.items())]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        paths.write_atomically(file, "".join(lines))
    except OSError:
        return None
    return file


def _decoder(formats: tuple[str, ...]) -> Json:
    return [PIL.__version__, _FORM, sorted(formats)]


def _load(record: Path, formats: tuple[str, ...]) -> dict[str, _Entry]:
    """Loads what `_save` wrote for this decoder; {} if it is damaged."""
    try:
        content = json.loads(paths.read(record))
        if content["decoder"] != _decoder(formats):
            return {}
        return {name: _Entry(tuple(stamp), *rest) for name, (stamp, *rest) in content["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _save(record: Path, files: Mapping[str, _Entry], formats: tuple[str, ...]) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        paths.write_atomically(record, json.dumps({"decoder": _decoder(formats), "files": files}))
    except OSError:
        pass  # without this record the next start checks again

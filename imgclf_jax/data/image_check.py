"""Finds the image files that cannot be read before anything is trained, and remembers what it has found."""

import concurrent.futures
import hashlib
import io
import itertools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL
from PIL import Image

from imgclf_jax.core import named_warnings
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable
from imgclf_jax.data.decode import FORMATS, MOST_PIXELS, decode, read_file
from imgclf_jax.data.image_files import Stamp
from imgclf_jax.run import cache, terminal
from imgclf_jax.run.provenance import write_atomically

_SMALL = 256 << 20  # Folders of fewer bytes than this, some seconds' work, are decoded whole in any case.
_SAVE_SECONDS = 60.0  # a process that is killed loses so much of its check
_FORM = 2  # to be raised when `decode` refuses other files than before
_BEGUN, _WHOLE = 1, 2  # how far a file was checked: its header and its end, or all its pixels
# How the file of a format ends, if it is not cut short. Other formats are decoded.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}


def unreadable(
    root: Path, stamps: Mapping[str, Stamp], whole: bool = False, formats: tuple[str, ...] = FORMATS
) -> dict[str, str]:
    """{name: reason} of those files in `root` that are no readable images in one of the formats, sorted by name.

    With `whole`, and where all files together are small, each is decoded. Else only its header and its end are read,
    and it is decoded if one of them looks wrong: some damage in the middle then shows in training. What was found is
    remembered by size and time of change, in the user's cache folder.
    """
    depth = _WHOLE if whole or sum(size for size, _ in stamps.values()) < _SMALL else _BEGUN
    record = cache.folder("checked") / f"{identity(root)}.json"
    known = _load(record, formats)  # name → [size, time, depth, reason]
    current = {n: entry for n, s in stamps.items() if (entry := known.get(n)) and tuple(entry[:2]) == s}
    todo = [name for name in stamps if name not in current or not (current[name][2] >= depth or current[name][3])]
    reasons = {name: entry[3] for name, entry in current.items() if entry[3]}
    pool = concurrent.futures.ThreadPoolExecutor()
    batches = itertools.batched(todo, 16)  # a million tasks would take more memory than their results
    parts = pool.map(lambda names: [_check(root / name, depth, formats) for name in names], batches)
    results = terminal.track(itertools.chain.from_iterable(parts), len(todo), f"checking {root.name}")
    saved = time.monotonic()
    try:
        for name, (remember, reason) in zip(todo, results, strict=True):
            if time.monotonic() - saved > _SAVE_SECONDS:
                _save(record, current, formats)
                saved = time.monotonic()
            current.pop(name, None)
            if remember:
                current[name] = [*stamps[name], depth, reason]
            if reason:
                reasons[name] = reason
    finally:  # after an error too, what was done need not be done again
        pool.shutdown(cancel_futures=True)
        if todo:
            _save(record, current, formats)
    return dict(sorted(reasons.items()))


def identity(folder: Path) -> str:
    """A name of 32 digits for what the cache folder holds of a folder."""
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]


def readable(file: Path, formats: tuple[str, ...]) -> bool:
    """Whether the file can be read and its image decoded."""
    return not _check(file, _WHOLE, formats)[1]


def write_list(name: str, reasons: Mapping[str, str]) -> Path | None:
    """Writes a line for each file of {path: reason}; gives where, or None where it cannot be written."""
    file = cache.folder("unreadable") / f"{name}.txt"
    lines = [f"{printable(path)}\t{printable(reason)}\n" for path, reason in sorted(reasons.items())]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines), encoding="utf-8")
    except OSError:
        return None
    return file


def _check(file: Path, depth: int, formats: tuple[str, ...]) -> tuple[bool, str]:
    """Whether to remember it, and why the file is unreadable, "" if it is not."""
    try:
        if depth == _WHOLE or not _looks_whole(file, formats):
            with named_warnings.about(lambda: str(file)):
                decode(read_file(file), formats=formats)
    except OSError as e:  # permissions, or a disk that fails: what may be otherwise at the next start
        return False, e.strerror or str(e)
    except UserError as e:
        return True, str(e)
    return True, ""


def _looks_whole(file: Path, formats: tuple[str, ...]) -> bool:
    """Whether the header is one that can be decoded, and the end is there. Reads a few hundred bytes."""
    with file.open("rb") as stream:
        start = stream.read(12)
        stream.seek(-min(64, os.fstat(stream.fileno()).st_size), io.SEEK_END)
        end = stream.read()
        stream.seek(0)
        try:
            with Image.open(stream, formats=formats) as picture:
                kind, mode, pixels = picture.format or "", picture.mode, picture.width * picture.height
        except Exception:  # of damaged bytes Pillow's plugins raise errors of many types
            return False
        if pixels > MOST_PIXELS:
            return False
        if kind == "WEBP":  # RIFF: it begins with the number of bytes that follow
            return stream.seek(0, io.SEEK_END) >= int.from_bytes(start[4:8], "little") + 8
    return kind in _ENDS and _ENDS[kind] in end and mode not in ("I", "F")


def _decoder(formats: tuple[str, ...]) -> list[Any]:
    return [PIL.__version__, _FORM, sorted(formats)]


def _load(record: Path, formats: tuple[str, ...]) -> dict[str, list[Any]]:
    """What `_save` wrote with this decoder; nothing if it is damaged."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        if content["decoder"] != _decoder(formats):
            return {}
        return {name: entry for name, entry in content["files"].items() if len(entry) == 4}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _save(record: Path, files: dict[str, list[Any]], formats: tuple[str, ...]) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps({"decoder": _decoder(formats), "files": files}))
    except OSError:
        pass  # Only a memory of what was checked: without it the next start checks again.

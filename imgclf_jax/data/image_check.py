"""Finds the image files that cannot be read before anything is trained, and remembers what it has found."""

import concurrent.futures
import hashlib
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import PIL
from PIL import Image

from imgclf_jax.core import named_warnings
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable
from imgclf_jax.data import decode as decode_ops
from imgclf_jax.data import decode_cost
from imgclf_jax.data.decode import FORMATS, decode, read_file
from imgclf_jax.data.image_files import Stamp
from imgclf_jax.run import cache, terminal
from imgclf_jax.run.provenance import write_atomically

_SMALL = 256 << 20  # Folders of fewer bytes than this, some seconds' work, are decoded whole in any case.
_HASHED_WHOLE = 16 << 30  # Of folders of more bytes only the ends of files are hashed, not to read them all at a start.
_END = 4096  # bytes
_SAVE_SECONDS = 60.0  # a process that is killed loses so much of its check
_FORM = 4  # to be raised when `decode` refuses other files than before, or what is remembered changes
_BEGUN, _WHOLE = 1, 2  # how far a file was checked: its header and its end, or all its pixels
# How the file of a format ends, if it is not cut short. Other formats are decoded.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}

Digest = Callable[[io.BufferedReader], str]


class Checked(NamedTuple):
    """What is known of a folder's files."""

    unreadable: dict[str, str]  # name → the reason; sorted
    digests: dict[str, str]  # name → 32 digits of what the file holds, for those that are readable


def check(
    root: Path,
    stamps: Mapping[str, Stamp],
    whole: bool = False,
    formats: tuple[str, ...] = FORMATS,
    host_ops: tuple[str, ...] = (),
    key: Path | None = None,
) -> Checked:
    """Which files in `root` are not readable images in one of the formats, and a digest of each of the others.

    With `whole`, and where all files together are small, each is decoded. Else only its header and its end are read,
    and it is decoded if one of them looks wrong: some damage in the middle then shows in training. An image is
    unreadable too if one of the specs `host_ops` refuses it for its size. Digests are SHA-256, over all bytes; if the
    files together have more than 16 GiB, over the size, the first and the last 4 KiB of each. What was found is
    remembered by size and times of change, in the user's cache folder: for `root`, or for the table `key` of the files.
    """
    total = sum(size for size, *_ in stamps.values())
    depth = _WHOLE if whole or total < _SMALL else _BEGUN
    digest = _digest if total <= _HASHED_WHOLE else _digest_of_ends
    record = cache.folder("checked") / f"{identity(key or root)}.json"
    known = _load(record, formats)
    current = {n: entry for n, s in stamps.items() if (entry := known.get(n)) and entry.stamp == s}
    todo = [name for name in stamps if name not in current or not current[name].covers(depth, digest.__name__)]
    pool = concurrent.futures.ThreadPoolExecutor()
    batches = itertools.batched(todo, 16)  # a million tasks would take more memory than their results
    parts = pool.map(lambda names: [_check(root / n, stamps[n], depth, digest, formats) for n in names], batches)
    results = terminal.track(itertools.chain.from_iterable(parts), len(todo), f"checking {(key or root).name}")
    passing: dict[str, _Entry] = {}
    saved = time.monotonic()
    try:
        for name, entry in zip(todo, results, strict=True):
            if time.monotonic() - saved > _SAVE_SECONDS:
                _save(record, current, formats)
                saved = time.monotonic()
            current.pop(name, None)
            (current if entry.depth else passing)[name] = entry
    finally:  # after an error too, what was done need not be done again
        pool.shutdown(cancel_futures=True)
        if todo:
            _save(record, current, formats)
    entries = current | passing
    reasons = {name: entry.reason for name, entry in entries.items() if entry.reason}
    reasons |= _refused(root, {name: entry.size for name, entry in entries.items() if not entry.reason}, host_ops)
    return Checked(dict(sorted(reasons.items())), {n: e.digest for n, e in entries.items() if n not in reasons})


def _refused(root: Path, sizes: Mapping[str, tuple[int, int]], host_ops: tuple[str, ...]) -> dict[str, str]:
    """{name: reason} of the images that one of the specs refuses for their size, which is the header's."""
    checks = [decode_ops.size_check(text) for text in host_ops]

    def refused(size: tuple[int, int]) -> bool:
        try:
            for one in checks:
                one(*size)
                one(*size[::-1])  # EXIF may turn it
        except UserError:
            return True
        return False

    suspects = {size for size in set(sizes.values()) if refused(size)}
    reasons = {}
    for name, size in sizes.items():
        if size in suspects and (reason := _refusal(root / name, host_ops)):
            reasons[name] = reason
    return reasons


def _refusal(file: Path, host_ops: tuple[str, ...]) -> str:
    """Why one of the specs refuses the image, decoded, for its size; "" if none does."""
    try:
        for text in host_ops:
            height, width, _ = decode_ops.decoder(text)(read_file(file)).shape
            decode_ops.size_check(text)(height, width)
    except OSError as e:
        return e.strerror or str(e)
    except UserError as e:
        return str(e)
    return ""


def identity(folder: Path) -> str:
    """A name of 32 digits for what the cache folder holds of a folder."""
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]


def readable(file: Path, host_ops: str) -> bool:
    """Whether the file can be read, its image decoded, and no host op refuses it for its size."""
    return not _refusal(file, (host_ops,))


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


class _Entry(NamedTuple):
    """What was found of a file. One of depth 0 is not remembered."""

    stamp: Stamp
    depth: int
    reason: str  # why it is unreadable, "" if it is not
    size: tuple[int, int] = (0, 0)  # height, width
    hashed: str = ""  # the function that gave the digest
    digest: str = ""

    def covers(self, depth: int, hashed: str) -> bool:
        """Whether nothing more is to be found by looking so far, with this digest."""
        return bool(self.reason) or (self.depth >= depth and self.hashed == hashed)


def _check(file: Path, stamp: Stamp, depth: int, digest: Digest, formats: tuple[str, ...]) -> _Entry:
    try:
        with file.open("rb") as stream:
            size = _size_if_whole(stream, formats, digest is _digest) if depth == _BEGUN else None
            if not size:
                stream.seek(0)
                with named_warnings.about(lambda: str(file)):
                    size = decode(read_file(file), formats=formats).shape[:2]
            stream.seek(0)
            return _Entry(stamp, depth, "", size, digest.__name__, digest(stream))
    except OSError as e:  # permissions, or a disk that fails: what may be otherwise at the next start
        return _Entry(stamp, 0, e.strerror or str(e))
    except UserError as e:
        return _Entry(stamp, depth, str(e))


def _digest(stream: io.BufferedReader) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def _digest_of_ends(stream: io.BufferedReader) -> str:
    length = os.fstat(stream.fileno()).st_size
    digest = hashlib.sha256(str(length).encode() + stream.read(_END))
    stream.seek(max(0, length - _END))
    digest.update(stream.read(_END))
    return digest.hexdigest()[:32]


def _size_if_whole(stream: io.BufferedReader, formats: tuple[str, ...], reads: bool) -> tuple[int, int] | None:
    """Height and width by the header; None if it is not one that can be decoded, or the end is not there.

    With `reads`, where all bytes are read anyway, the scans of a JPEG image are counted too.
    """
    start, length = stream.read(12), os.fstat(stream.fileno()).st_size
    stream.seek(-min(64, length), io.SEEK_END)
    end = stream.read()
    stream.seek(0)
    try:
        with Image.open(stream, formats=formats) as picture:
            decode_ops.check_size(picture)
            kind, mode, size = picture.format or "", picture.mode, (picture.height, picture.width)
            if reads and kind in ("JPEG", "MPO"):
                stream.seek(0)
                decode_cost.check(stream.read(), picture)
    except Exception:  # of damaged bytes Pillow's plugins raise errors of many types
        return None
    if kind == "WEBP":  # RIFF: it begins with the number of bytes that follow
        return size if length >= int.from_bytes(start[4:8], "little") + 8 else None
    return size if kind in _ENDS and _ENDS[kind] in end and mode not in ("I", "F") else None


def _decoder(formats: tuple[str, ...]) -> list[Any]:
    return [PIL.__version__, _FORM, sorted(formats)]


def _load(record: Path, formats: tuple[str, ...]) -> dict[str, _Entry]:
    """What `_save` wrote with this decoder; nothing if it is damaged."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        if content["decoder"] != _decoder(formats):
            return {}
        return {name: _Entry(tuple(stamp), depth, reason, tuple(size), hashed, digest)
                for name, (stamp, depth, reason, size, hashed, digest) in content["files"].items()}  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _save(record: Path, files: Mapping[str, _Entry], formats: tuple[str, ...]) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps({"decoder": _decoder(formats), "files": files}))
    except OSError:
        pass  # Only a memory of what was checked: without it the next start checks again.

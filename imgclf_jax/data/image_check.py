"""Finds unreadable image files before training begins, and caches the results."""

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

from imgclf_jax.core import named_warnings, places
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable
from imgclf_jax.data import decode as decode_ops
from imgclf_jax.data import decode_cost
from imgclf_jax.data.decode import FORMATS, decode, read_file
from imgclf_jax.data.image_files import Stamp
from imgclf_jax.run import cache, progress

_SMALL = 256 << 20  # bytes of a folder whose images are always decoded, in some seconds
_HASHED_WHOLE = 16 << 30  # bytes of a folder beyond which only the ends of files are hashed, to start faster
_END = 4096  # bytes
_SAVE_SECONDS = 60.0  # the work that a killed process may lose
_FORM = 5  # increase it when `decode` refuses other files than before, or the cache changes
_ENDS_CHECKED, _DECODED = 1, 2  # the depth of a check: header and end, or all pixels
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}  # of complete files; other formats are decoded

Digest = Callable[[io.BufferedReader], str]


class Checked(NamedTuple):
    """The result of a check."""

    unreadable: dict[str, str]  # name → the reason; sorted
    digests: dict[str, str]  # name → 32 hex digits of the contents, for readable files


def check(
    root: Path, stamps: Mapping[str, Stamp], decode_all: bool = False, formats: tuple[str, ...] = FORMATS,
    host_ops: tuple[str, ...] = (), key: Path | None = None,
) -> Checked:  # fmt: skip
    """Finds the files in `root` that are not readable images in one of the formats, and digests the others.

    It decodes every file with `decode_all` or if all are small together. Otherwise it reads only headers and ends, and
    decodes a file if these look wrong, so damage in the middle shows up in training. An image that one of the
    specs `host_ops` refuses for its size is unreadable too. Digests are the SHA-256 of all bytes, or beyond 16 GiB of
    files in all, of the size and the first and last 4 KiB of each. Results are cached by size and change times in the
    user's cache folder, for `root` or for the table `key` of the files.
    """
    total = sum(size for size, *_ in stamps.values())
    depth = _DECODED if decode_all or total < _SMALL else _ENDS_CHECKED
    digest = _digest if total <= _HASHED_WHOLE else _digest_of_ends
    record = cache.folder("checked") / f"{identity(key or root)}.json"
    known = _load(record, formats)
    current = {n: entry for n, s in stamps.items() if (entry := known.get(n)) and entry.stamp == s}
    todo = [name for name in stamps if name not in current or not current[name].covers(depth, digest.__name__)]
    pool = concurrent.futures.ThreadPoolExecutor()
    batches = itertools.batched(todo, 16)  # a million tasks would take more memory than their results
    parts = pool.map(lambda names: [_check(root / n, stamps[n], depth, digest, formats) for n in names], batches)
    results = progress.track(itertools.chain.from_iterable(parts), len(todo), f"checking {(key or root).name}")
    uncached: dict[str, _Entry] = {}
    saved = time.monotonic()
    try:
        for name, entry in zip(todo, results, strict=True):
            if time.monotonic() - saved > _SAVE_SECONDS:
                _save(record, current, formats)
                saved = time.monotonic()
            current.pop(name, None)
            (current if entry.depth else uncached)[name] = entry
    finally:  # keeps the work done before an error
        pool.shutdown(cancel_futures=True)
        if todo:
            _save(record, current, formats)
    entries = current | uncached
    reasons = {name: entry.reason for name, entry in entries.items() if entry.reason}
    reasons |= _refused(root, {name: entry.size for name, entry in entries.items() if not entry.reason}, host_ops)
    return Checked(dict(sorted(reasons.items())), {n: e.digest for n, e in entries.items() if n not in reasons})


def _refused(root: Path, sizes: Mapping[str, tuple[int, int]], host_ops: tuple[str, ...]) -> dict[str, str]:
    """Returns {name: reason} of the images that one of the specs refuses for their size; `sizes` are the headers'."""
    checks = {text: decode_ops.size_check(text) for text in host_ops}

    def may_be_refused(size: tuple[int, int]) -> bool:
        try:
            for text, check_size in checks.items():
                for possible in decode_ops.possible_sizes(text, *size):
                    check_size(*possible)
        except UserError:
            return True
        return False

    suspects = {size for size in set(sizes.values()) if may_be_refused(size)}
    reasons = {}
    for name, size in sizes.items():
        if size in suspects and (reason := _refusal(root / name, host_ops, decode_ops.decoded_size)):
            reasons[name] = reason
    return reasons


def _refusal(file: Path, host_ops: tuple[str, ...], size_of: Callable[[str, bytes], tuple[int, int]]) -> str:
    """Why one of the specs refuses the image for its size, `size_of(spec, data)` after `decode`; "" if none does."""
    try:
        data = read_file(file)
        for text in host_ops:
            decode_ops.size_check(text)(*size_of(text, data))
    except OSError as e:
        return e.strerror or str(e)
    except UserError as e:
        return str(e)
    return ""


def identity(folder: Path) -> str:
    """The name of a folder in the cache, 32 hex digits."""
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]


def readable(file: Path, host_ops: str) -> bool:
    """Whether the image file can be read and decoded, and no host op refuses it for its size."""
    return not _refusal(file, (host_ops,), lambda text, data: decode_ops.decoder(text)(data).shape[:2])


def write_list(name: str, reasons: Mapping[str, str]) -> Path | None:
    """Writes a line for each file of {path: reason} to the cache folder. Returns the list, or None on failure."""
    file = cache.folder("unreadable") / f"{name}.txt"
    lines = [f"{printable(path)}\t{printable(reason)}\n" for path, reason in sorted(reasons.items())]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        places.write_atomically(file, "".join(lines))
    except OSError:
        return None
    return file


class _Entry(NamedTuple):
    """The result for a file. Depth 0 is not cached."""

    stamp: Stamp
    depth: int
    reason: str  # why it is unreadable; "" if readable
    size: tuple[int, int] = (0, 0)  # height, width
    hashed: str = ""  # the name of the digest function
    digest: str = ""

    def covers(self, depth: int, hashed: str) -> bool:
        """Whether a check of this depth, with this digest function, would find nothing new."""
        return bool(self.reason) or (self.depth >= depth and self.hashed == hashed)


def _check(file: Path, stamp: Stamp, depth: int, digest: Digest, formats: tuple[str, ...]) -> _Entry:
    try:
        with places.open_regular(file) as stream:
            size = _size_if_complete(stream, formats, digest is _digest) if depth == _ENDS_CHECKED else None
            if not size:
                stream.seek(0)
                with named_warnings.about(lambda: str(file)):
                    size = decode(read_file(file), formats=formats).shape[:2]
            stream.seek(0)
            return _Entry(stamp, depth, "", size, digest.__name__, digest(stream))
    except OSError as e:  # permissions or a failing disk, which may be transient
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


def _size_if_complete(stream: io.BufferedReader, formats: tuple[str, ...], count_scans: bool) -> tuple[int, int] | None:
    """Height and width by the header; None if it is not decodable or the end of the file is missing.

    `count_scans` also checks the scans of a JPEG image, which takes reading all its bytes.
    """
    start, length = stream.read(12), os.fstat(stream.fileno()).st_size
    stream.seek(-min(64, length), io.SEEK_END)
    end = stream.read()
    stream.seek(0)
    try:
        with Image.open(stream, formats=formats) as picture:
            decode_ops.check_size(picture)
            kind, mode, size = picture.format or "", picture.mode, (picture.height, picture.width)
            if count_scans and kind in ("JPEG", "MPO"):
                stream.seek(0)
                decode_cost.check(stream.read(), picture)
    except Exception:  # Pillow's plugins raise many types for damaged bytes
        return None
    if kind == "WEBP":  # RIFF begins with the number of bytes that follow
        return size if length >= int.from_bytes(start[4:8], "little") + 8 else None
    return size if kind in _ENDS and _ENDS[kind] in end and mode not in ("I", "F") else None


def _decoder(formats: tuple[str, ...]) -> list[Any]:
    return [PIL.__version__, _FORM, sorted(formats)]


def _load(record: Path, formats: tuple[str, ...]) -> dict[str, _Entry]:
    """Loads what `_save` wrote for this decoder; {} if it is damaged."""
    try:
        content = json.loads(places.read(record))
        if content["decoder"] != _decoder(formats):
            return {}
        return {name: _Entry(tuple(stamp), depth, reason, tuple(size), hashed, digest)
                for name, (stamp, depth, reason, size, hashed, digest) in content["files"].items()}  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _save(record: Path, files: Mapping[str, _Entry], formats: tuple[str, ...]) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        places.write_atomically(record, json.dumps({"decoder": _decoder(formats), "files": files}))
    except OSError:
        pass  # without this cache the next start checks again

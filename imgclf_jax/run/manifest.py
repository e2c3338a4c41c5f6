"""The manifest of a checkpoint: size and CRC-32 of each file, since Orbax does not notice a flipped bit."""

import hashlib
import json
import os
import zlib
from pathlib import Path

from imgclf_jax.core import paths

NAME = "manifest.json"  # {file: [bytes, CRC-32]}
ABSENT = f"it has no {NAME}; perhaps a process was killed while saving it"
_PIECE = 1 << 20  # bytes per read


def write(folder: Path) -> None:
    """Writes the manifest of the files in `folder`, after syncing them to the disk.

    In a bucket, which keeps its own checksums, it has only sizes (the checksum is -1), and files are not read back.
    """
    files = {name: _measure(file, sync=True) for name, file in sorted(paths.files(folder))}
    paths.write_atomically(folder / NAME, json.dumps(files))


def digest(folder: Path) -> str:
    """A digest of the manifest in `folder`, and so of its files; "no manifest" without one."""
    try:
        return hashlib.sha256(paths.read(folder / NAME)).hexdigest()[:12]
    except OSError:
        return "no manifest"


def find_fault(folder: Path) -> str:
    """Says what is wrong with the files in `folder`: "" for nothing, ABSENT without a manifest."""
    try:
        files = {name: [int(size), int(crc)] for name, (size, crc) in json.loads(paths.read(folder / NAME)).items()}
    except FileNotFoundError:
        return ABSENT
    except OSError as e:
        return f"{NAME} cannot be read: {e.strerror}"
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        files = {}
    if not files:
        return f"{NAME} does not hold the size and checksum of each file"
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"the file {name} is missing"
        if _measure(file) != expected:
            return f"the file {name} has changed"
    return ""


def _measure(file: Path, sync: bool = False) -> list[int]:
    if paths.in_bucket(file):
        return [paths.size(file), -1]
    size, crc = 0, 0
    with paths.open_regular(file) as stream:
        while piece := stream.read(_PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
        if sync:
            os.fsync(stream.fileno())
    return [size, crc]

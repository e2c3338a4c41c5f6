"""Untrusted zip archives, whose claimed sizes are checked before anything is unpacked."""

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_MAX_READ = 16 << 20  # bytes per read; bounds the archive's directory, which zipfile reads in one go
_DEFLATE = 1032  # the greatest compression ratio of deflate


class _BoundedReader(io.BufferedReader):
    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_READ:
            raise zipfile.BadZipFile("the directory of the archive is too long")
        return super().read(size)


@contextlib.contextmanager
def open_checked(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens an archive for reading, and checks that no member claims more than its bytes can unpack to.

    Raises BadZipFile for that and for a member neither stored nor deflated, OSError, and other errors for damage.
    """
    length = path.stat().st_size
    with _BoundedReader(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            most = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _DEFLATE}.get(member.compress_type)
            if most is None:
                raise zipfile.BadZipFile(f"{member.filename[:100]!r} is neither stored nor deflated")
            if member.compress_size > length or member.file_size > most * member.compress_size:
                raise zipfile.BadZipFile(f"{member.filename[:100]!r} is longer than the archive can hold")
        yield archive


def read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Reads a member into uint8[n], without a second copy. Raises BadZipFile if it is damaged (CRC) or truncated."""
    out = np.empty(member.file_size, np.uint8)
    done = 0
    with archive.open(member) as stream:
        while block := stream.read(1 << 20):
            out[done : done + len(block)] = np.frombuffer(block, np.uint8)
            done += len(block)
    if done != len(out):
        raise zipfile.BadZipFile(f"{member.filename[:100]!r} is truncated")
    return out

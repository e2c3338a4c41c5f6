"""Zip archives of unknown origin: what they claim is checked before anything is unpacked."""

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_MOST_AT_ONCE = 16 << 20  # bytes of one read; so the archive's directory, which zipfile reads at once, is no longer
_DEFLATE = 1032  # A byte of deflate gives so many bytes at most.


class _InParts(io.BufferedReader):
    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MOST_AT_ONCE:
            raise zipfile.BadZipFile("the directory of the archive is too long")
        return super().read(size)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, open to be read. Its members are stored or deflated, and none claims more than its bytes can give.

    Raises BadZipFile or an OSError, and for damage other errors of many types.
    """
    length = path.stat().st_size
    with _InParts(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            most = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _DEFLATE}.get(member.compress_type)
            if most is None:
                raise zipfile.BadZipFile(f"{member.filename[:100]!r} is packed in an unusual way")
            if member.compress_size > length or member.file_size > most * member.compress_size:
                raise zipfile.BadZipFile(f"{member.filename[:100]!r} is longer than the archive can hold")
        yield archive


def read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of a member, uint8[n], held once. Raises BadZipFile where they are damaged (its CRC) or too few."""
    out = np.empty(member.file_size, np.uint8)
    done = 0
    with archive.open(member) as stream:
        while part := stream.read(1 << 20):
            out[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)
    if done != len(out):
        raise zipfile.BadZipFile(f"{member.filename[:100]!r} is cut short")
    return out

"""Paths on disks and in buckets (`gs://…`, `s3://…`), with one set of operations.

A path in a bucket is an `etils.epath.Path`, which has the methods of `pathlib.Path`. Buckets have no locks, and their
objects cannot be appended to: each is written in one go.
"""

import contextlib
import errno
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from imgclf_jax.core import extras, spec
from imgclf_jax.core.errors import UserError, reason

# Otherwise epath uses TensorFlow's file systems if installed, which lack S3 and raise other errors.
os.environ.setdefault("EPATH_USE_TF", "false")
_DRIVERS = {"gs": "gcsfs", "s3": "s3fs"}
_LINKED = "{} is a link, pipe or device, and a run holds only regular files and folders; move it away"


def as_path(text: str) -> Path:
    """Converts a path, in which `~` is a home directory, `gs://BUCKET/…` or `s3://BUCKET/…` to a path.

    Raises UserError for other addresses, for a bucket whose driver is not installed, and for one that an untrusted
    config names (see `spec.untrusted`).
    """
    scheme, sign, rest = text.partition("://")
    if not sign or not scheme.isalnum():
        return Path(os.path.expanduser(text))
    if scheme not in _DRIVERS or not rest.strip("/"):
        raise UserError(f"{text!r} is not a path; allowed are a path, gs://BUCKET/PATH or s3://BUCKET/PATH")
    spec.check_trusted(f"{text!r}, which is on the network")
    extras.require("buckets", text, _DRIVERS[scheme])
    from etils import epath

    return cast(Path, epath.Path(text))


def cache_folder(name: str) -> Path:
    """`~/.cache/imgclf_jax/NAME`, or the same under XDG_CACHE_HOME. It may not exist, and can be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "imgclf_jax", name)


def in_bucket(path: Path) -> bool:
    """Whether a path is in a bucket."""
    return str(path).startswith(tuple(f"{scheme}://" for scheme in _DRIVERS))


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields (name relative to the folder, path) of every file below a folder, in no particular order."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from ((f"{entry.name}/{name}", file) for name, file in files(entry))
        else:
            yield entry.name, entry


def open_regular(path: Path, mode: str = "rb", encoding: str | None = None, errors: str | None = None) -> Any:
    """Opens a regular file to read or append. Raises OSError for a folder, pipe, socket or device, and never waits.

    Nothing is written through a link, symbolic or hard: it may lead to a file that is not ours.
    """
    if in_bucket(path):
        return path.open(mode, encoding=encoding, errors=errors)
    return open(path, mode, encoding=encoding, errors=errors, opener=_open)


def _open(path: str, flags: int) -> int:
    if writes := flags & (os.O_WRONLY | os.O_RDWR):
        flags |= os.O_NOFOLLOW
    with contextlib.suppress(FileNotFoundError):  # opening a device may already do something
        _refuse_others(os.stat(path, follow_symlinks=not writes), writes, path)
    handle = os.open(path, flags | os.O_NONBLOCK, 0o666)
    try:
        _refuse_others(os.fstat(handle), writes, path)
    except OSError:
        os.close(handle)
        raise
    return handle


def _refuse_others(found: os.stat_result, writes: int, path: str) -> None:
    if not stat.S_ISREG(found.st_mode) or (writes and found.st_nlink > 1):
        kinds = "link, folder, pipe or device" if writes else "folder, pipe or device"
        raise OSError(errno.EINVAL, f"{os.path.basename(path)!r} is a {kinds}; move it away", path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a temporary file next to `path` to write to, and atomically renames it to `path` at the end.

    A reader sees the old content or the new one, even after a crash, or if several processes write it at once. What has
    the name `path` is replaced, even a link or a pipe. On an error it stays; the OSError of a full disk names `path`.
    """
    if in_bucket(path):
        yield (content := io.BytesIO())
        path.write_bytes(content.getvalue())
        return
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x+b") as file:  # a new file, not one that a link of this name leads to
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # persists the new name too
        os.close(folder)
    except OSError as e:
        if e.filename in (None, str(temporary)):
            raise OSError(e.errno, reason(e), str(path)) from e
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file atomically, text as UTF-8: see `replacing`."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents. Raises UserError if it is a link, which may lead to a folder that is not ours."""
    if in_bucket(folder):
        return
    if folder.is_symlink():
        raise UserError(_LINKED.format(folder))
    folder.mkdir(parents=True, exist_ok=True)


def check_plain(folder: Path) -> None:
    """Raises UserError unless `folder`, if it exists, and all below it are regular files and folders.

    Call it before a library opens, moves or removes them by their names.
    """
    todo = [] if in_bucket(folder) else [folder]
    while todo:
        path = todo.pop()
        with contextlib.suppress(FileNotFoundError):  # another process may remove files meanwhile
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                todo += path.iterdir()
            elif not stat.S_ISREG(mode):
                raise UserError(_LINKED.format(path))


def remove(path: Path) -> None:
    """Removes a folder with its contents, or a file, a link or a pipe, if it exists."""
    if in_bucket(path):
        path.rmtree(missing_ok=True)  # type: ignore[attr-defined]
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def size(file: Path) -> int:
    """The size of a file in bytes."""
    found: Any = file.stat()  # that of an `etils.epath.Path` has a length
    return int(found.length if hasattr(found, "length") else found.st_size)


def read(file: Path) -> bytes:
    """The content of a regular file: see `open_regular`."""
    with open_regular(file) as opened:
        return bytes(opened.read())


def move(folder: Path, target: Path) -> None:
    """Moves a folder to an unused name. In a bucket it copies each file, so the move is not atomic."""
    if not in_bucket(folder):
        folder.rename(target)
        return
    for name, file in list(files(folder)):
        file.copy(target / name)  # type: ignore[attr-defined]
    remove(folder)

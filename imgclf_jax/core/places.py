"""Paths on disks and in buckets (`gs://…`, `s3://…`), with one set of operations.

A path in a bucket is an `etils.epath.Path`, which has the methods of `pathlib.Path`. Buckets have no locks, and their
objects cannot be appended to: each is written in one go.
"""

import contextlib
import fcntl
import importlib.util
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast
from urllib.parse import unquote

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError, reason

# Otherwise epath uses TensorFlow's file systems if installed, which lack S3 and raise other errors.
os.environ.setdefault("EPATH_USE_TF", "false")
_DRIVERS = {"gs": "gcsfs", "s3": "s3fs"}


def as_path(text: str) -> Path:
    """Converts a path, `file:///PATH`, `gs://BUCKET/…` or `s3://BUCKET/…` to a path.

    Raises UserError for other addresses, for a bucket whose driver is not installed, and for one that an untrusted
    config names (see `spec.untrusted`).
    """
    scheme, sign, rest = text.partition("://")
    if not sign or not scheme.isalnum():
        return Path(text)
    if scheme == "file" and rest.startswith("/"):
        return Path(unquote(rest))
    if scheme not in _DRIVERS or not rest.strip("/"):
        raise UserError(f"{text!r} is not a path; allowed are a path, file:///PATH, gs://BUCKET/PATH or "
                        "s3://BUCKET/PATH")  # fmt: skip
    spec.check_network(text)
    if not importlib.util.find_spec(_DRIVERS[scheme]):
        raise UserError(f"{text!r}: reading and writing this bucket needs {_DRIVERS[scheme]}, which is not installed; "
                        "install it by `uv sync --extra buckets`")  # fmt: skip
    from etils import epath

    return cast(Path, epath.Path(text))


def expand_user(text: str) -> Path:
    """`as_path` with `~` and `~NAME` replaced by home directories. Raises UserError also for an unknown user."""
    path = as_path(text)
    try:
        return path.expanduser()
    except RuntimeError as e:
        user, own = path.parts[0], f"~/{str(path)[1:]}"
        fix = "" if user == "~" else f"{own!r} for a path in your own, or "
        raise UserError(f"{text!r}: this system knows no home directory {user!r}; write {fix}the whole path") from e


def in_bucket(path: Path) -> bool:
    """Whether a path is in a bucket."""
    return str(path).startswith(tuple(f"{scheme}://" for scheme in _DRIVERS))


def absolute(path: Path) -> Path:
    """The path from the root of the file system or bucket."""
    return path if in_bucket(path) else path.absolute()


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields (name relative to the folder, path) of every file below a folder, in no particular order."""
    todo = [("", folder)]
    while todo:
        prefix, directory = todo.pop()
        for entry in directory.iterdir():
            name = prefix + entry.name
            if entry.is_dir():
                todo.append((f"{name}/", entry))
            else:
                yield name, entry


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file next to `path` to write to, and atomically renames it to `path` at the end.

    A reader sees the old content or the new one, even after a crash, or if several processes write it at once. On an
    error, `path` keeps its content and the temporary file is removed; the OSError of a full disk names `path`.
    """
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as directory:
            yield (local := Path(directory) / path.name)
            path.write_bytes(local.read_bytes())
        return
    # A fixed name, so that what a killed process left is overwritten, unless another process is writing to it.
    temporary, file = path.with_name(f".{path.name}.tmp"), -1
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666)
        if not _lock(file, temporary):
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        parent = os.open(path.parent, os.O_RDONLY)
        os.fsync(parent)  # persists the new name too
        os.close(parent)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(e, OSError) and (e.filename is None or temporary.name[:-3] in str(e.filename)):
            why = os.strerror(e.errno) if e.errno else reason(e)
            raise OSError(e.errno, why, str(path)) from e
        raise
    finally:
        if file >= 0:
            os.close(file)  # and with it the lock


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file atomically, text as UTF-8: see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _lock(file: int, path: Path) -> bool:
    """Locks the open file `path`; returns False if another process has it or has just renamed it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # a file system without locks
        return True


def remove(folder: Path) -> None:
    """Removes a folder and its contents, if it exists."""
    if in_bucket(folder):
        if folder.exists():
            folder.rmtree()  # type: ignore[attr-defined]
    else:
        shutil.rmtree(folder, ignore_errors=True)


def size(file: Path) -> int:
    """The size of a file in bytes."""
    stat = file.stat()
    # `etils.epath.Path` has a length, on a disk too.
    return int(stat.length if hasattr(stat, "length") else stat.st_size)  # type: ignore[attr-defined]


def read(file: Path, most: int) -> bytes:
    """The content of a file of at most `most` bytes. Raises UserError for a longer one, before it allocates memory."""
    if size(file) > most:
        raise UserError(f"{file} is longer than {most >> 20} MB; restore, shorten or remove it")
    return file.read_bytes()


def check_output(file: Path, flag: str, suffixes: Sequence[str]) -> None:
    """Raises UserError, naming the `flag`, unless a file with one of the `suffixes` can be written in its directory.

    A .parquet file needs pyarrow.
    """
    if file.suffix not in suffixes:
        names = " or ".join(filter(None, [", ".join(suffixes[:-1]), suffixes[-1]]))
        raise UserError(f"{flag}={file}: the name must end in {names}")
    if file.suffix == ".parquet" and not importlib.util.find_spec("pyarrow"):
        raise UserError(f"{flag}={file}: Parquet needs pyarrow, which is not installed; run `uv sync --extra parquet`, "
                        "or name another format")  # fmt: skip
    if not file.parent.is_dir():
        raise UserError(f"{flag}={file}: the directory {str(file.parent)!r} does not exist; create it first")


def move(folder: Path, target: Path) -> None:
    """Moves a folder to an unused name. In a bucket it copies each file, so the move is not atomic."""
    if not in_bucket(folder):
        folder.rename(target)
        return
    for name, file in list(files(folder)):
        file.copy(target / name)  # type: ignore[attr-defined]
    remove(folder)

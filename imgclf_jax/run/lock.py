"""The lock of a work directory: one training run at a time."""

import contextlib
import datetime
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def held(file: Path) -> Iterator[None]:
    """Holds the lock `file` inside, and removes it at the end. The file names its holder.

    The operating system releases the lock (`flock`) however the process ends. Missing folders are created. Raises
    UserError, with host, process and time, if another process holds it, and if the folder cannot be written. Warns if
    the file system has no locks.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _take(file)
    except OSError as e:
        reason = "it is a file" if file.parent.is_file() else e.strerror
        raise UserError(f"work directory {file.parent} cannot be written: {reason}; pass another --workdir") from e
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while still locked, or it could remove the next holder's file
        handle.close()


def is_held(file: Path) -> bool:
    """Whether a process holds the lock `file` now; False if that is unknown."""
    try:
        with paths.open_regular(file) as opened:  # also another user's
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared with others that look
    except BlockingIOError:
        return True
    except OSError:  # no such file
        return False
    return False


def _take(file: Path) -> IO[str]:
    while True:
        handle = paths.open_regular(file, "a+", "utf-8", "replace")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            with handle:
                handle.seek(0)
                who = handle.read(200) or "which began just now"
            raise UserError(f"{file.parent} is in use by another training run ({who}); wait until it ends, stop it, or "
                            "pass another --workdir") from e  # fmt: skip
        except OSError as e:  # on some network file systems
            log.warning("%s cannot be locked (%s): start no second run in it while this one trains", file.parent, e)
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), file.stat()):
                break
        handle.close()  # its last holder removed the file in between
    handle.truncate(0)
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    content = f"host {socket.gethostname()}, process {os.getpid()}, since {now}"
    os.write(handle.fileno(), content.encode())  # unbuffered, as a full disk would keep the handle from being closed
    return handle

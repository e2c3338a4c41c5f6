"""Refuses data that cannot fit into the machine's memory, before reading them."""

import contextlib
import ctypes
import os

from imgclf_jax.core.errors import UserError

MAX_OP_BYTES = 1 << 29  # for one host op on one image; several images are decoded at once

_keeps = False


def physical() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keep_freed() -> None:
    """Makes glibc's allocator keep freed memory for the next call; other allocators do as they do.

    Returning and faulting in tens of megabytes per call takes as long as a step on CPU. Each arena keeps its own, so
    fewer than the default of eight per core bound the total.
    """
    global _keeps
    _keeps = True
    with contextlib.suppress(OSError, AttributeError):
        mallopt, trim_threshold, mmap_threshold, arena_max = ctypes.CDLL(None).mallopt, -1, -3, -8
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)
        if "MALLOC_ARENA_MAX" not in os.environ and "arena_max" not in os.environ.get("GLIBC_TUNABLES", ""):
            mallopt(arena_max, max(2, len(os.sched_getaffinity(0))))


def keep_freed_again() -> None:
    """`keep_freed`, if it was called before: TensorFlow undoes it at the first `Dataset.from_generator`."""
    if _keeps:
        keep_freed()


def trim() -> None:
    """Returns the allocator's free memory to the system: see `keep_freed`."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def require(nbytes: int, what: str) -> None:
    """Raises UserError if `what` needs more bytes than the machine has."""
    if nbytes > (most := physical()):
        raise UserError(f"{what} needs {size(nbytes)} of memory, but this machine has {size(most)}")


def require_for_op(op: str, old: tuple[int, int], new: tuple[int, int], nbytes: int) -> None:
    """Raises UserError if a host op from image size `old` to `new`, (h, w), needs more than MAX_OP_BYTES."""
    if nbytes > MAX_OP_BYTES:
        raise UserError(f"{op} from {old[0]:,} by {old[1]:,} to {new[0]:,} by {new[1]:,} pixels needs {size(nbytes)} "
                        f"of memory, but a host op may take {size(MAX_OP_BYTES)}; crop the image first")  # fmt: skip


def size(nbytes: int) -> str:
    """A human-readable number of bytes: '1.5 GB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000  # type: ignore[assignment]
    return f"{nbytes:,.0f} TB"

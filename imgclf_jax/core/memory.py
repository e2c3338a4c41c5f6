"""Memory: refuses data that cannot fit, before reading them, and sets the allocator up."""

import contextlib
import ctypes
import os

from imgclf_jax.core import machine
from imgclf_jax.core.errors import UserError


def keep_freed() -> None:
    """Makes glibc's allocator keep freed memory: to fault tens of megabytes in again takes as long as a step on CPU.

    All threads share the main arena: the others hold at most 64 MB, and larger arrays are mapped anew at each step, a
    fifth of the time of training ResNet-20. Above 256 MB they are mapped all the same: between the fragments of the
    heap they found no place, and training ViT-S at 224 pixels took 3.4 instead of 1.8 GB.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt, trim_threshold, mmap_threshold, arena_max = ctypes.CDLL(None).mallopt, -1, -3, -8
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**28)
        if "MALLOC_ARENA_MAX" not in os.environ and "arena_max" not in os.environ.get("GLIBC_TUNABLES", ""):
            mallopt(arena_max, 1)


def require(nbytes: int, what: str) -> None:
    """Raises UserError if `what` needs more bytes than this process may use."""
    if nbytes > (most := machine.memory()):
        raise UserError(f"{what} needs {format_bytes(nbytes)} of memory, but this machine has {format_bytes(most)}")


def format_bytes(nbytes: int) -> str:
    """A human-readable number of bytes: '1.5 GB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000  # type: ignore[assignment]
    return f"{nbytes:,.0f} TB"

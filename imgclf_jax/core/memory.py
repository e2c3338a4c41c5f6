"""How much memory the machine has, so that what cannot fit is refused before it is read."""

import contextlib
import ctypes
import os

from imgclf_jax.core.errors import UserError

MOST_FOR_AN_OP = 1 << 29  # bytes that one host op may take for one image; several are decoded at once


def physical() -> int | None:
    """Bytes of memory that the machine has; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None


def give_back() -> None:
    """Gives memory that is free in this process back to the system; the allocator keeps it, see `run.environment`."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def require(nbytes: int, what: str) -> None:
    """Raises UserError if `what` takes more bytes than the machine has."""
    if (most := physical()) is not None and nbytes > most:
        raise UserError(f"{what} takes {size(nbytes)} of memory, and this machine has {size(most)}")


def require_for_op(op: str, old: tuple[int, int], new: tuple[int, int], nbytes: int) -> None:
    """Raises UserError if a host op that brings an image from size `old` to `new`, (h, w), takes too many bytes."""
    if nbytes > MOST_FOR_AN_OP:
        raise UserError(f"{op} from {old[0]:,} by {old[1]:,} to {new[0]:,} by {new[1]:,} pixels takes {size(nbytes)} "
                        f"of memory, and a host op at most {size(MOST_FOR_AN_OP)}; crop the image first")  # fmt: skip


def size(nbytes: int) -> str:
    """A number of bytes for people: '1.5 GB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000  # type: ignore[assignment]
    return f"{nbytes:,.0f} TB"

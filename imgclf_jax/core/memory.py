"""How much memory the machine has, so that what cannot fit is refused before it is read."""

import os

from imgclf_jax.core.errors import UserError


def physical() -> int | None:
    """Bytes of memory that the machine has; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None


def require(nbytes: int, what: str) -> None:
    """Raises UserError if `what` takes more bytes than the machine has."""
    if (most := physical()) is not None and nbytes > most:
        raise UserError(f"{what} takes {size(nbytes)} of memory, and this machine has {size(most)}")


def size(nbytes: int) -> str:
    """A number of bytes for people: '1.5 GB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000  # type: ignore[assignment]
    return f"{nbytes:,.0f} TB"

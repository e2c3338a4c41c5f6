"""Errors that the user can fix, and the sentence for a wrong name."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A mistake in a flag, key, spec, file or checkpoint: one sentence that says what, where, what is allowed.

    `launch.py` prints it without a traceback and exits with 1.
    """


class Untrusted(UserError):
    """A work directory names code, which is not run unless the person says so."""


_MOST_SHOWN = 200  # characters


def shown(value: Any) -> str:
    """A value as a sentence can hold it, text in quotes: of a long text its beginning."""
    return repr(f"{value[:_MOST_SHOWN]}…" if isinstance(value, str) and len(value) > _MOST_SHOWN else value)


def unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    """A sentence for a name that is not among `allowed`, the nearest ones first."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(str(name), allowed, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"unknown {kind} {shown(name)}: {hint}allowed: {', '.join(allowed)}"


def reason(error: BaseException) -> str:
    """What an error from a library says, in one line: its first, or that the disk is full, however it is wrapped."""
    text = str(error).strip()
    if "no space left" in text.lower():
        return "no space left on device"
    return (text.splitlines() or [type(error).__name__])[0][:300]

"""Errors that the user can fix, and the message for an unknown name."""

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path


class UserError(ValueError):
    """A mistake in a flag, key, spec, file or checkpoint; one sentence says what, where, and what is allowed.

    `launch.py` prints it without a traceback and exits with 1.
    """


class UsageError(UserError):
    """A word or flag that is wrong whatever the files and the run hold: `launch.py` prints it and exits with 2."""


class Untrusted(UserError):
    """A work directory names code, which runs only with --trust."""


def no_such(what: str, kind: str, path: object) -> UserError:
    """The error for `what` names a `kind`, such as "file", that does not exist."""
    return UserError(f"{what}: there is no {kind} {str(path)!r} (working directory: {Path.cwd()})")


def shown(value: object) -> str:
    """The repr of a value for a message, with text truncated to 200 characters."""
    return repr(f"{value[:200]}…" if isinstance(value, str) and len(value) > 200 else value)


def unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    """A message for a name that is not among `allowed`, with those spelled alike first."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(str(name), allowed, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"unknown {kind} {shown(name)}: {hint}allowed: {', '.join(allowed)}"


def check_choice(kind: str, name: str, allowed: Collection[str]) -> None:
    """Raises UserError unless a name is among `allowed`: see `unknown`."""
    if name not in allowed:
        raise UserError(unknown(kind, name, allowed))


def reason(error: BaseException) -> str:
    """The first line of a library's error, or "no space left on device" wherever it mentions that."""
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).strip()
    if "no space left" in text.lower():
        return "no space left on device"
    return (text.splitlines() or [type(error).__name__])[0][:300]

"""Names of files and classes as they may be shown, and the streams that they are shown on."""

import io
import os
import sys


def printable(text: str) -> str:
    r"""The text with each character that is not printable as its escape, such as `\x1b`, `\n` or `\udcff`.

    A name in a file system may hold anything: a line break that would end a table's row, a sequence that would make
    the terminal do something, bytes that are no UTF-8 (Python holds them as lone surrogates).
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def utf8(name: str) -> str:
    """A file's name, which Python has decoded as the locale says, as UTF-8: so it is the same in every locale."""
    if sys.getfilesystemencoding() == "utf-8":
        return name
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def prepare_streams() -> None:
    """Makes standard output and error take any text, and be there even if they were closed.

    What their encoding does not have is written as an escape. A stream that was closed, as by `>&-`, leads nowhere: its
    number must not go to the next file that is opened, which C libraries would then print to.
    """
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers, since the lowest free one is taken
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def keep_output() -> None:
    """Standard output is for results: what libraries in C++ print there, as Gloo does, goes to standard error."""
    sys.stdout.flush()
    own = os.dup(sys.stdout.fileno())
    os.dup2(2, sys.stdout.fileno())
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115

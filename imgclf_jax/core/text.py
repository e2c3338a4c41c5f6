"""Printable file and class names, and standard streams that accept any text."""

import io
import os
import sys
from collections.abc import Iterable


def printable(text: str) -> str:
    r"""Escapes each unprintable character, such as `\x1b`, `\n` or `\udcff`.

    A file name may hold anything: a line break that would end a table row, a terminal escape sequence, bytes that are
    not UTF-8 (which Python holds as lone surrogates).
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def escape_surrogates(text: str) -> str:
    r"""Escapes lone surrogates, such as `\udcff`, by which Python holds bytes that are not UTF-8: the text encodes."""
    return text.encode("utf-8", "backslashreplace").decode()


def one_per_line(names: Iterable[str]) -> str:
    r"""Joins names by line breaks, and escapes those in a name, such as `\n`, and bytes that are not UTF-8."""
    return escape_surrogates("\n".join(name.replace("\n", r"\n").replace("\r", r"\r") for name in names))


def decimals(value: float) -> str:
    """Formats a number with four decimals; what is not 1 or 0 is not shown as such: ">0.9999", "<0.0001"."""
    text = f"{value:.4f}"
    if text == "1.0000" and value < 1:
        return ">0.9999"
    return "<0.0001" if text == "0.0000" and value > 0 else text


def interval(low: float, high: float) -> str:
    """Formats the ends of an interval."""
    return f"{decimals(low)} to {decimals(high)}"


def prepare_streams() -> None:
    """Makes standard output and error accept any text: characters outside the encoding are escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def redirect_native_output() -> None:
    """Sends what C++ libraries such as Gloo print to standard output to standard error: stdout is for results."""
    sys.stdout.flush()
    own = os.dup(sys.stdout.fileno())
    os.dup2(2, sys.stdout.fileno())
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115

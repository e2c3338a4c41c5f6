"""What a person sees: log lines and progress on standard error, tables on standard output."""

import contextlib
import copy
import functools
import itertools
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import progress
from rich.cells import cell_len
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from imgclf_jax.core import named_warnings, processes
from imgclf_jax.core.text import printable


@functools.cache
def console() -> Console:
    """The console on standard error. There is one only, so that log lines do not break the progress bar."""
    return Console(stderr=True)


def shows_progress() -> bool:
    """Whether there is a terminal to show it on, which the first of several processes alone does."""
    return console().is_terminal and not processes.index()


def busy(what: str) -> contextlib.AbstractContextManager[Any]:
    """Shows what is being done, on a terminal; elsewhere nothing."""
    return console().status(escape(printable(what))) if shows_progress() else contextlib.nullcontext()


def track[T](items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """The items, with a progress bar on a terminal; elsewhere without one."""
    if not total or not shows_progress():
        return items
    return progress.track(items, escape(printable(what)), total, console=console(), transient=True)


def count[T](items: Iterable[T], what: str) -> Iterator[T]:
    """The items, with how many there have been on a terminal; elsewhere nothing."""
    if not shows_progress():
        yield from items
        return
    with console().status(f"0 {escape(what)}") as status:
        begun = time.monotonic()
        for number, item in enumerate(items, 1):
            if number % 100 == 0:
                status.update(f"{number:,} {escape(what)}, {number / (time.monotonic() - begun):,.0f} a second")
            yield item


def setup_logging() -> None:
    """Prints log lines `HH:MM:SS message` on standard error, above the progress bar if there is one.

    Of several processes the first one does; the others print warnings alone, with their number.
    """
    process = processes.index()
    if process:
        handler: logging.Handler = logging.StreamHandler()
        line = f"%(asctime)s [process {process}] %(message)s"
    elif console().is_terminal:
        handler = RichHandler(console=console(), show_path=False, show_level=False, highlighter=None)
        line = "%(message)s"
    else:
        handler, line = logging.StreamHandler(), "%(asctime)s %(message)s"
    handler.addFilter(_printable)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format=line, datefmt="%H:%M:%S", force=True)
    logging.getLogger("imgclf_jax").setLevel(logging.WARNING if process else logging.INFO)
    # Orbax logs an error a dozen times, with tracebacks, before it raises it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of shapes, which have no type
    sys.unraisablehook = _report_unraisable
    named_warnings.to_log()


def _printable(record: logging.LogRecord) -> logging.LogRecord:
    """The record with names escaped. Only where the message itself begins a new line, as for a table, lines stay."""
    out, text = copy.copy(record), record.getMessage()
    lines = text.split("\n") if "\n" in str(record.msg) else [text]
    out.msg, out.args = "\n".join(map(printable, lines)), None
    return out


_usual_hook = sys.unraisablehook


def _report_unraisable(unraisable: Any) -> None:
    """Hides one message: after a failed save, TensorStore still calls an event loop that is closed by then."""
    if str(unraisable.exc_value) != "Event loop is closed":
        _usual_hook(unraisable)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table on standard output. If this is no terminal, a row is one line of any length, for programs.

    Characters that are not printable, or that the output's encoding does not have, are escaped.
    """
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(_cell, row))
    _stdout().print(table)


def print_long_table(columns: Sequence[str], rows: Iterable[Sequence[str]], first: int) -> None:
    """`print_table` of any number of rows, printed `first` at a time; nothing if there is no row.

    Columns are as wide as the first rows need, and wider in later parts where those need more.
    """
    widths = [len(name) for name in columns]
    for part, some in enumerate(itertools.batched(rows, first)):
        cells = [[_cell(cell) for cell in row] for row in some]
        widths = [
            max(old, *map(cell_len, column)) for old, column in zip(widths, zip(*cells, strict=True), strict=True)
        ]
        table = Table(show_header=not part)
        for name, width in zip(columns, widths, strict=True):
            table.add_column(name, min_width=width)
        for row in cells:
            table.add_row(*row)
        _stdout().print(table)


def _stdout() -> Console:
    width = None if sys.stdout.isatty() else 1000
    return Console(width=width, markup=False, emoji=False)  # a file may be called "a[b]:c:.png"


def _cell(text: str) -> str:
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def format_metrics(values: Mapping[str, float]) -> str:
    """`loss 0.1234  accuracy 0.9876`, for people."""
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())

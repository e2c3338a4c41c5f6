"""Terminal output: log lines and progress on standard error, tables on standard output."""

import contextlib
import copy
import functools
import itertools
import json
import logging
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from imgclf_jax.core import named_warnings, processes
from imgclf_jax.core.text import decimals, printable
from imgclf_jax.core.typing import Json

_AT_ONCE = 1000  # rows of a streamed table; the first ones determine its column widths


@functools.cache
def console() -> Console:
    """The one console on standard error, shared so that log lines do not break the progress bar."""
    return Console(stderr=True)


def shows_progress() -> bool:
    """Whether to show progress: on a terminal, in process 0."""
    return console().is_terminal and not processes.index()


def busy(what: str) -> contextlib.AbstractContextManager[object]:
    """Inside, shows a spinner on a terminal."""
    return console().status(escape(printable(what))) if shows_progress() else contextlib.nullcontext()


# Called before each record of the log is written, by what has something on the terminal that must make room.
before_records: list[Callable[[], None]] = []


def setup_logging() -> None:
    """Prints log lines `HH:MM:SS message` on standard error, above the progress bar if there is one.

    Processes other than process 0 print only warnings, with their index.
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
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns about shapes, which have no type
    sys.unraisablehook = _report_unraisable
    named_warnings.install()


def _printable(record: logging.LogRecord) -> logging.LogRecord:
    """Escapes unprintable characters in a record. Line breaks stay if the message itself has them, as tables do."""
    for make_room in before_records:
        make_room()
    out, text = copy.copy(record), record.getMessage()
    lines = text.split("\n") if "\n" in str(record.msg) else [text]
    out.msg, out.args = "\n".join(map(printable, lines)), None
    return out


_usual_hook = sys.unraisablehook


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Hides one message: after a failed save, TensorStore still calls an event loop that is already closed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        _usual_hook(unraisable)


def columns() -> int | None:
    """The width of standard output if that is a terminal; None elsewhere, where programs read lines of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def shorten(text: str, width: int) -> str:
    """The text in at most `width` columns of a terminal; "…" stands for the rest."""
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - 1)).rstrip() + "…"


def print_text(text: str, indent: int = 0) -> None:
    """Prints a paragraph on standard output; on a terminal in lines that end between words, from the second indented.

    Escapes unprintable characters.
    """
    width, text = columns(), printable(text)
    if width is not None and cell_len(text) > width:
        text = textwrap.fill(text, max(20, width), subsequent_indent=" " * indent, break_long_words=False,
                             break_on_hyphens=False)  # fmt: skip
    print(text, flush=True)


def print_json(value: Json) -> None:
    """Prints JSON on standard output, with null for NaN and infinity, which JSON does not have."""
    print(json.dumps(nonfinite_to_null(value), indent=2))


def nonfinite_to_null(value: Json) -> Json:
    """Replaces NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {name: nonfinite_to_null(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [nonfinite_to_null(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], streamed: bool = False) -> None:
    """Prints a table on standard output. Unless on a terminal, a row is one line of any length, for programs.

    On a terminal the widest cells go on in the next line until the table fits. Escapes characters that are unprintable
    or missing from the output's encoding. If `streamed`, prints rows as they come, a thousand at a time, in columns as
    wide as the rows so far need, and nothing without rows.
    """
    widths = [len(name) for name in columns]
    for part, some in enumerate(itertools.batched(rows, _AT_ONCE) if streamed else [tuple(rows)]):
        cells = [[_cell(cell) for cell in row] for row in some]
        if cells:
            widths = [
                max(old, *map(cell_len, column)) for old, column in zip(widths, zip(*cells, strict=True), strict=True)
            ]
        between = 3 * len(widths) + 1  # lines and spaces
        stdout = _stdout(sum(widths) + between)
        table = Table(show_header=not part)
        for name, width in zip(columns, _fit(widths, stdout.width - between), strict=True):
            table.add_column(name, width=width, overflow="fold")
        for row in cells:
            table.add_row(*row)
        stdout.print(table)


def _fit(widths: Sequence[int], most: int) -> list[int]:
    """The widths of columns that together take `most` characters, or as they are: the widest ones are narrower."""
    fitted = list(widths)
    while sum(fitted) > most and max(fitted) > 1:
        fitted[fitted.index(max(fitted))] -= 1
    return fitted


def _stdout(needed: int) -> Console:
    width = None if sys.stdout.isatty() else needed
    return Console(width=width, markup=False, emoji=False)  # a file may be called "a[b]:c:.png"


def _cell(text: str) -> str:
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def format_metrics(values: Mapping[str, float]) -> str:
    """`loss 0.1234  accuracy 0.9876`, for people."""
    return "  ".join(f"{k} {_metric(v)}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def _metric(value: float) -> str:
    return decimals(value) if 0.9999 < value < 1 else f"{value:.4g}"

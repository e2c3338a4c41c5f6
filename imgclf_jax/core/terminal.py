"""Terminal output: log lines and progress on standard error, tables on standard output."""

import contextlib
import copy
import functools
import json
import logging
import math
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from imgclf_jax.core import processes
from imgclf_jax.core.text import decimals, printable
from imgclf_jax.core.typing import Json

_WIDE = 1_000_000  # columns of an output that is no terminal, where a row is one line


@functools.cache
def console() -> Console:
    """The one console on standard error, shared so that log lines do not break the progress bar."""
    return Console(stderr=True)


def shows_progress() -> bool:
    """Whether to show progress: on a terminal, in process 0."""
    return console().is_terminal and not processes.index()


def showing(what: str) -> contextlib.AbstractContextManager[object]:
    """A context inside which a terminal shows `what`; elsewhere nothing does."""
    return console().status(Text(printable(what))) if shows_progress() else contextlib.nullcontext()


def track[T](
    items: Iterable[T], total: int, what: str, weight: Callable[[T], int] = lambda _: 1
) -> Generator[T, None, None]:
    """Yields the items, and shows how many of the `total` the caller is done with; one counts as `weight(item)`."""
    columns = TextColumn("{task.description}", markup=False), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console(), transient=True, disable=not shows_progress(),
                  redirect_stdout=sys.stdout.isatty(), redirect_stderr=False) as progress:  # fmt: skip
        task = progress.add_task(printable(what), total=total)
        for item in items:
            yield item
            progress.advance(task, weight(item))


def setup_logging() -> None:
    """Prints log lines `HH:MM:SS message` on standard error, above the progress bar if there is one.

    Processes other than process 0 print only warnings, with their index.
    """
    process = processes.index()
    handler: logging.Handler = logging.StreamHandler()
    line = f"%(asctime)s [process {process}] %(message)s" if process else "%(asctime)s %(message)s"
    if shows_progress():
        handler = RichHandler(console=console(), show_path=False, show_level=False, highlighter=None)
        line = "%(message)s"
    handler.addFilter(_printable)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format=line, datefmt="%H:%M:%S", force=True)
    logging.getLogger("imgclf_jax").setLevel(logging.WARNING if process else logging.INFO)
    # Orbax logs an error a dozen times, with tracebacks, before it raises it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns about shapes, which have no type


def _report_unraisable(unraisable: "sys.UnraisableHookArgs", usual: Callable[..., object] = sys.unraisablehook) -> None:
    """Hides one message: after a failed save, TensorStore still calls an event loop that is already closed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        usual(unraisable)


def _printable(record: logging.LogRecord) -> logging.LogRecord:
    """Escapes unprintable characters in a record. Line breaks stay if the message itself has them, as tables do."""
    out, text = copy.copy(record), record.getMessage()
    lines = text.split("\n") if "\n" in str(record.msg) else [text]
    out.msg, out.args = "\n".join(map(printable, lines)), None
    return out


def print_text(text: str) -> None:
    """Prints a line on standard output, with unprintable characters escaped. A terminal breaks it between words."""
    if sys.stdout.isatty():
        Console(markup=False, emoji=False, highlight=False).print(printable(text))
    else:
        print(printable(text), flush=True)


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


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table on standard output, with unprintable characters escaped; nothing without rows.

    On a narrow terminal cells go on in the next line; elsewhere a row is one line of any length, for programs.
    """
    encoding = sys.stdout.encoding or "utf-8"
    console = Console(width=None if sys.stdout.isatty() else _WIDE, markup=False, emoji=False)
    cells = [[printable(cell).encode(encoding, "backslashreplace").decode(encoding) for cell in row] for row in rows]
    table = Table(*(Column(name, overflow="fold") for name in columns))
    # The first column, of names without spaces, stays whole if there is room.
    table.columns[0].no_wrap = all(len(row[0]) <= console.width // 2 for row in cells)
    for row in cells:
        table.add_row(*row)
    if cells:  # a file may be called "a[b]:c:.png"
        console.print(table)


def format_metrics(values: Mapping[str, float]) -> str:
    """`loss 0.1234  accuracy 0.9876`, for people."""
    return "  ".join(f"{k} {_metric(v)}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def _metric(value: float) -> str:
    return decimals(value) if 0.9999 < value < 1 else f"{value:.4g}"

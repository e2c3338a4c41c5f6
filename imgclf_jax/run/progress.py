"""Progress of long work: a line on a terminal that is replaced as the work goes on, elsewhere lines of the log."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from imgclf_jax.core import processes
from imgclf_jax.core.text import printable
from imgclf_jax.run import terminal

log = logging.getLogger(__name__)

_FIRST_SHOWN, _NEXT_SHOWN = 0.5, 0.25  # seconds until the line is shown on a terminal, and between its updates
_FIRST_LOGGED, _NEXT_LOGGED = 10.0, 60.0  # the same for log lines elsewhere


def track[T](
    items: Iterable[T], total: int | None, what: str, weight: Callable[[T], int] = lambda _: 1, prints: bool = False
) -> Iterator[T]:
    """Yields the items, and meanwhile shows how many the caller is done with, of the `total` if that is known.

    An item counts as `weight(item)`. With `prints`, the caller prints between items: the line makes room for that.
    """
    if total == 0 or processes.index():
        yield from items
        return
    done, began = 0, time.monotonic()
    most = terminal.console().width - 1 if terminal.shows_progress() else None
    with Line(lambda: describe(what, done, total, time.monotonic() - began, most)) as line:
        for item in items:
            with line.hidden() if prints and sys.stdout.isatty() else contextlib.nullcontext():
                yield item
            done += weight(item)


def describe(what: str, done: int, total: int | None, seconds: float, most: int | None = None) -> str:
    """`evaluating test: 1,280 of 10,000, 640 a second, 14 s left`. If it exceeds `most` columns, `what` is cut."""
    rate = done / seconds if seconds > 0 else 0.0
    text = f": {min(done, total) if total else done:,}" + (f" of {total:,}" if total else "")
    if done:
        text += f", {rate:,.0f} a second" if rate >= 1 else f", {1 / rate:,.1f} s each"
    if done and total and done < total:
        text += f", {duration((total - done) / rate)} left"
    what = printable(what)
    return (what if most is None else terminal.shorten(what, max(8, most - len(text)))) + text


def duration(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3.5 h, 4.2 days."""
    for unit, size, most, form in (("s", 1, 90, ".0f"), ("min", 60, 5400, ".0f"), ("h", 3600, 172_800, ".1f")):
        if seconds < most:
            return f"{seconds / size:{form}} {unit}"
    return f"{seconds / 86400:.1f} days"


class Line:
    """Shows what `describe` gives while inside, see the module. It is called in another thread, and may be "".

    `logged` are the seconds until the first line of the log, and between the next ones; None for the usual ones.
    """

    def __init__(self, describe: Callable[[], str], logged: tuple[float, float] | None = None):
        self._describe, self._ended = describe, threading.Event()
        self._logged = logged or (_FIRST_LOGGED, _NEXT_LOGGED)
        self._lock, self._drawn, self._hidden = threading.RLock(), False, 0
        self._quiet_until = 0.0
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        terminal.before_records.append(self._make_room)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        terminal.before_records.remove(self._make_room)
        self.clear()

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """While inside, the line is not shown, for example to write on standard output."""
        with self._lock:
            self._hidden += 1
            self.clear()
        try:
            yield
        finally:
            with self._lock:
                self._hidden -= 1

    def clear(self) -> None:
        """Removes the line from the terminal until its next update."""
        with self._lock:
            if self._drawn:
                self._write("")

    def _make_room(self) -> None:
        self._quiet_until = time.monotonic() + 0.1  # the record is written after this
        self.clear()

    def _run(self) -> None:
        shown = terminal.shows_progress()
        wait, following = (_FIRST_SHOWN, _NEXT_SHOWN) if shown else self._logged
        while not self._ended.wait(wait):
            wait = following
            text = self._describe()
            if not shown and text:
                log.info("%s", text)
            if not shown:
                continue
            text = terminal.shorten(text, terminal.console().width - 1)
            with self._lock:
                if text and not self._hidden and time.monotonic() >= self._quiet_until:
                    self._write(text)

    def _write(self, text: str) -> None:
        file = terminal.console().file
        file.write(f"\r\x1b[2K{text}")
        file.flush()
        self._drawn = bool(text)

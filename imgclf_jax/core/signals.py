"""Signals that ask a process to stop: SIGINT (Ctrl-C), SIGTERM, and SIGHUP (the terminal was closed).

Outside of `noted` there is nothing to save: the process ends at once with one line and status 128 + the signal's
number. Inside, the request is noted, and the training loop saves and stops. A thread handles signals, because Python
runs its handlers only between bytecodes of the main thread, which may be compiling for minutes.
"""

import concurrent.futures
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

log = logging.getLogger(__name__)

type Handler = Callable[[int, FrameType | None], object] | int | None
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STATUS_SAVED = 75  # EX_TEMPFAIL: stopped with a checkpoint saved; run the same command again
SAME = 2.0  # seconds within which signals are one request: `uv run` repeats what the terminal sends to the whole group

# Called, in any thread, with the exit status and message before a signal ends the process.
before_exit: list[Callable[[int, str], None]] = []


class Stopped(Exception):
    """A signal interrupted work that can be repeated; the argument is its name."""


def number(name: str) -> int:
    """The number of a signal by its name."""
    return signal.Signals[name].value


def wait_for[T](future: concurrent.futures.Future[T], stop: Callable[[], str]) -> T:
    """Waits for the future's result. Raises Stopped if `stop` returns the name of a signal first."""
    while not concurrent.futures.wait([future], timeout=0.1).done:
        check(stop)
    return future.result()


def check(stop: Callable[[], str]) -> None:
    """Raises Stopped if `stop` returns the name of a signal."""
    if name := stop():
        raise Stopped(name)


class _Requests:
    """The requests since `noted` was entered.

    - `losing` describes what ending at once would lose; None outside of `noted`.
    - `began` is the time of the latest earlier request, some of whose signals may still arrive.
    """

    def __init__(self, losing: Callable[[], str] | None = None, began: float = -SAME, grace: float = 0.0):
        self.losing = losing
        self.first = ""
        self.began = began
        self._count = 0
        self._grace, self._timer = grace, threading.Timer(grace, lambda: None)

    def note(self, number: int) -> None:
        """Lets the loop know at its next step."""
        if self.losing is not None and not self.first:
            self.first = signal.Signals(number).name

    def receive(self, number: int) -> None:
        """Handles a signal: notes the first request, warns at the second, and ends the process at the third."""
        name, now = signal.Signals(number).name, time.monotonic()
        if name == "SIGHUP":
            _leave_terminal()
        if now - self.began < SAME:
            return
        if self.losing is None:
            _end(number, f"{name}: stopped; run the same command again")
        self._count, self.began = self._count + 1, now
        self.note(number)
        if self._count == 1:
            log.warning("%s: stopping after this step, and saving a checkpoint", name)
            self._end_in_time(number, name)
        elif self._count == 2:
            log.warning("%s again: a checkpoint is being saved; a third signal ends the process at once and loses %s",
                        name, self.losing())  # fmt: skip
        else:
            _end(number, f"{name} again: stopped at once; lost: {self.losing()}")

    def _end_in_time(self, number: int, name: str) -> None:
        """Ends the process after `grace` seconds, before the sender of the signal kills it."""
        losing = self.losing
        if self._grace and losing:
            text = f"{name}: not saved in {self._grace:g} s, the --grace; stopped at once; lost: "
            self._timer = threading.Timer(self._grace, lambda: _end(number, text + losing()))
            self._timer.daemon = True
            self._timer.start()

    def cancel(self) -> None:
        """Cancels the timer of `grace`, since work has stopped in time."""
        self._timer.cancel()


_now = _Requests()
_pipe: int | None = None  # where signals are written for the thread; None unless the handlers are installed
_terminals: list[int] = []  # the standard streams, by descriptor, that were a terminal


def install() -> threading.Thread:
    """Installs the handlers for the whole process. Signals that were ignored at its start stay ignored.

    Returns the thread that handles signals. It ends when the pipe is closed.
    """
    global _pipe
    read, _pipe = os.pipe()
    os.set_blocking(_pipe, False)
    _terminals[:] = [number for number in (0, 1, 2) if os.isatty(number)]
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under `nohup`
            signal.signal(number, _pass_on)
    signal.set_wakeup_fd(_pipe, warn_on_full_buffer=False)  # Python's own handler in C writes to it, at once
    thread = threading.Thread(target=_watch, args=(read,), name="signals", daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def noted(losing: Callable[[], str], grace: float = 0.0) -> Iterator[Callable[[], str]]:
    """Inside, notes requests to stop; yields a function that returns the first signal's name, or "".

    Signals within SAME seconds are one request. The second request logs what a third would lose, in the words of
    `losing`. The third ends the process, as does a timer `grace` seconds after the first, unless 0. If `install` was
    not called, the handlers are installed only inside; outside the main thread, Python allows none.
    """
    global _now, _pipe
    own = _pipe is None and threading.current_thread() is threading.main_thread()
    before: dict[int, Handler] = {}
    if own:
        before = {number: signal.getsignal(number) for number in SIGNALS}
        thread = install()
    _now = requests = _Requests(losing, grace=grace)
    try:
        yield lambda: requests.first
    finally:
        requests.cancel()
        if own and _pipe is not None:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(_pipe)
            _pipe = None
            thread.join()
        _now = _Requests(began=requests.began)
        _now.first = requests.first


def obey_noted() -> None:
    """Ends the process if a signal arrived in the last `noted` and was not obeyed there. There is nothing to save."""
    if name := _now.first:
        _end(number(name), f"{name}: stopped; run the same command again")


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Python's handler, in the main thread."""
    if _pipe is not None:
        _now.note(number)
        if signal.set_wakeup_fd(_pipe, warn_on_full_buffer=False) != _pipe:  # an event loop had replaced it
            os.write(_pipe, bytes([number]))


def _watch(read: int) -> None:
    while data := os.read(read, 1):
        if data[0] in SIGNALS:
            _now.receive(data[0])
    os.close(read)


def _leave_terminal() -> None:
    """Redirects the closed terminal's streams to the null device, where writes do not fail."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in _terminals:
        os.dup2(nowhere, number)
    os.close(nowhere)


def _end(number: int, line: str) -> NoReturn:
    leave(128 + number, line)


def leave(status: int, line: str) -> NoReturn:
    """Ends the process at once, from any thread, with a line on standard error."""
    for function in before_exit:
        with contextlib.suppress(Exception):
            function(status, line)
    shown = "\x1b[?25h" if sys.stderr and sys.stderr.isatty() else ""  # a progress bar hides the cursor
    with contextlib.suppress(OSError):
        os.write(2, f"{shown}{line}\n".encode())
    os._exit(status)


def _forget() -> None:
    """Restores the default handlers in a forked process, such as a library's worker."""
    global _pipe
    if _pipe is not None:
        signal.set_wakeup_fd(-1)
        _pipe = None
        for number in SIGNALS:
            if signal.getsignal(number) is _pass_on:
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)

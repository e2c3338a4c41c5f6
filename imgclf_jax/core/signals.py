"""Signals that ask a process to stop, noted instead of obeyed."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], str | None]]:
    """While inside, SIGTERM and SIGINT are noted instead of obeyed; gives a function that returns the first one's name.

    That is None while none has come. A second signal acts as it would outside, at once.
    """
    received: list[str] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)

"""Stops on a signal: SIGINT (Ctrl-C) or SIGTERM.

Outside of `stopping` there is nothing to save, and the process ends at once. Inside, the training loop asks after each
step, saves, and ends. A signal to any of several processes stops all after one step, by JAX's preemption sync point.
"""

import contextlib
import itertools
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from imgclf_jax.core import internals, processes

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STATUS_SAVED = 75  # EX_TEMPFAIL: stopped with a checkpoint saved; run the same command again

_points = itertools.count(1)  # of JAX's preemption service: the calls of `stop`, the same in all processes


class Stopped(Exception):
    """A signal interrupted work that the next process repeats; the argument is its name."""


def end_on_signals() -> None:
    """Lets a signal end the process with status 128 + its number: a line on standard error, and SystemExit.

    Where an exception would be dropped or abort the process, it ends at once, without any clean-up.
    """

    def end(number: int, frame: FrameType | None) -> None:
        ignore_signals()  # `uv run` sends Ctrl-C a second time
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):
            os.write(2, f"{name}: stopped; nothing is lost; run the same command again\n".encode())
        # The module being imported may be C++, which aborts the process on an exception.
        if any(f.f_code.co_filename == "<frozen importlib._bootstrap>" for f, _ in traceback.walk_stack(frame)):
            os._exit(128 + number)
        # Where Python would drop the exception: in a finalizer, or a callback of the garbage collector such as JAX's.
        sys.unraisablehook = lambda _: os._exit(128 + number)
        raise SystemExit(128 + number)

    _handle(end)


def ignore_signals() -> None:
    """Ignores signals from now on, in a process that is ending."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], str]]:
    """Inside, signals are noted. Yields `stop() -> str`: the name of the signal that asks to stop here, or "".

    Of several processes, all must call `stop` equally often, for example after each step and before each batch of an
    evaluation. It returns the name in all of them from the same call on. Outside the main thread nothing is noted.
    """
    received = told = ""
    if several := processes.count() > 1:
        import jax
        from jax.experimental import multihost_utils

    def note(number: int, _: FrameType | None) -> None:
        nonlocal received
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # the only signal that JAX's service knows
        else:
            received = received or signal.Signals(number).name

    def stop() -> str:
        nonlocal received, told
        if several and not received and multihost_utils.reached_preemption_sync_point(next(_points)):
            received = "SIGTERM"
        if received and not told:
            told = received
            log.warning("%s: stopping after this step, and saving a checkpoint", told)
        return received

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = _handle(note)
    try:
        if several:  # JAX notes SIGTERM from now on, in place of Python's handler
            jax.config.update("jax_enable_preemption_service", True)
            if not (state := internals.coordination_state()).preemption_sync_manager:
                state.initialize_preemption_sync_manager()
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Installs a handler; returns those before. Signals that are ignored stay so, as under `nohup`."""
    numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}

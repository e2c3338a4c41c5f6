"""Stops a run on a signal, at the same step in all of its processes.

JAX's preemption sync point, which Orbax uses, knows only SIGTERM and is checked once per step. The points here are also
inside compilation and evaluation, where a run may spend most of its time.
"""

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Container, Iterator

from imgclf_jax.core import processes, signals
from imgclf_jax.core.errors import UserError

log = logging.getLogger(__name__)


class Stopping:
    """Decides where all processes stop. Call it at points that all of them pass in the same order.

    It returns the signal's name if all stop here, else "". `asked` returns the name of the signal that this process
    received, or "". Any process may receive one at any time, and none knows how far the others are. So after a signal
    each publishes the number of points it has passed, waits for those of all others, and continues to the largest.
    `number` tells the attempts of one process apart.
    """

    def __init__(self, asked: Callable[[], str], wait: float = processes.WAIT, number: int = 0):
        self._asked, self._wait, self._number = asked, wait, number
        self._lock = threading.Lock()
        self._passed = 0  # points
        self._name = ""  # the signal, once `_passed` is published
        self._last: int | None = None  # the point where all stop, once known
        self._met: set[str] = set()  # the points of `wait_for_all` that are done

    def __call__(self) -> str:
        """Passes a point, or stops there."""
        if processes.count() == 1:
            return self._asked()
        with self._lock:
            if not self._received():
                self._passed += 1
                return ""
        if self._agreed():
            return self._name
        self._passed += 1
        return ""

    def waiting(self) -> str:
        """The same between two points, as often as needed, for a process that waits for its own work."""
        if processes.count() == 1:
            return self._asked()
        with self._lock:
            received = self._received()
        return self._name if received and self._agreed() else ""

    def wait_for_all(self, what: str) -> None:
        """Waits for all processes the first time it is called with `what`.

        Raises signals.Stopped if all stop before that, and UserError, naming the missing processes, after a day.
        """
        if processes.count() == 1 or what in self._met:
            return
        self._met.add(what)
        place = self._place(what)
        processes.publish(f"{place}/{processes.index()}", True)
        end = time.monotonic() + processes.PREPARING
        while len(arrived := processes.published(place)) < processes.count():
            signals.check(self.waiting)
            if time.monotonic() > end:
                raise UserError(f"process {_missing(arrived)} is not {what} after a day; see its log")
            time.sleep(0.05)

    def hear(self, name: str, process: int) -> None:
        """Notes the signal that another process received."""
        with self._lock:
            if not self._name:
                log.warning("%s at process %d: stopping, and saving a checkpoint", name, process)
                self._publish(name)

    def _received(self) -> bool:
        """Whether any process received a signal. Tells the others of the signal of this process."""
        if not self._name and (name := self._asked()):
            self._publish(name)
            processes.tell("stop", name)
        return bool(self._name)

    def _publish(self, name: str) -> None:
        self._name = name
        processes.publish(f"{self._place('passed')}/{processes.index()}", self._passed)

    def _place(self, what: str) -> str:
        return f"{what}-{self._number}" if self._number else what

    def _agreed(self) -> bool:
        """Whether all processes stop at the current point of this one."""
        if self._last is None:
            end = time.monotonic() + self._wait
            passed: dict[str, int] = {}
            while len(passed) < processes.count():
                if time.monotonic() > end:
                    raise UserError(f"process {_missing(passed)} has not reported its step {self._wait:g} s after "
                                    f"{self._name}; the last checkpoint is intact")  # fmt: skip
                passed = processes.published(self._place("passed"))
                time.sleep(0.01)
            self._last = max(passed.values())
        return self._passed == self._last


_numbers = itertools.count()  # of the attempts in this process, which all processes begin together


def _missing(arrived: Container[str]) -> str:
    return ", ".join(number for number in map(str, range(processes.count())) if number not in arrived)


@contextlib.contextmanager
def stopping(losing: Callable[[], str], grace: float = 0.0) -> Iterator[Stopping]:
    """Inside, notes signals (see `signals.noted`); yields the `Stopping` to call at each point."""
    with signals.noted(losing, grace) as asked:
        stop = Stopping(asked, number=next(_numbers))
        processes.listeners.append(stop.hear)
        for name, process in list(processes.stops):  # signals that came earlier
            stop.hear(name, process)
        try:
            yield stop
            # Until then, others may wait for the count of this one. Process 0 may still verify a checkpoint.
            processes.barrier("the end of training", processes.PREPARING)
        finally:
            processes.listeners.remove(stop.hear)

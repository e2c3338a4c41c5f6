"""Stops a run on a signal, at the same step in all of its processes.

JAX's preemption sync point, which Orbax asks, knows SIGTERM alone and is asked once a step. The points here also lie in
compilation and evaluation, where a run may spend most of its time.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Container, Iterator

from imgclf_jax.core import processes, signals
from imgclf_jax.core.errors import UserError

log = logging.getLogger(__name__)


class Stopping:
    """Call it at points that all processes pass in the same order: the signal's name if all stop here, else "".

    `asked` returns the name of the signal that this process received, or "". Any process may receive one at any time,
    and none knows how far the others are. So after a signal each publishes the number of points it has passed, waits
    for those of all others, and goes on to the largest one, where all stop.
    """

    def __init__(self, asked: Callable[[], str], wait: float = processes.WAIT):
        self._asked, self._wait = asked, wait
        self._lock = threading.Lock()
        self._passed = 0  # points
        self._name = ""  # of the signal, from when `_passed` was said on
        self._last: int | None = None  # the point where all stop, once it is known
        self._met: set[str] = set()  # where all have waited for each other

    def __call__(self) -> str:
        """Passes a point, or stops there."""
        if processes.count() == 1:
            return self._asked()
        with self._lock:
            if not self._heard():
                self._passed += 1
                return ""
        if self._agreed():
            return self._name
        self._passed += 1
        return ""

    def waiting(self) -> str:
        """The same between two points, any number of times, for a process that waits for work of its own."""
        if processes.count() == 1:
            return self._asked()
        with self._lock:
            heard = self._heard()
        return self._name if heard and self._agreed() else ""

    def wait_for_all(self, what: str) -> None:
        """Waits for all processes the first time it is called with `what`.

        Raises signals.Stopped if all stop before that, and UserError, naming the missing processes, after a day.
        """
        if processes.count() == 1 or what in self._met:
            return
        self._met.add(what)
        processes.publish(f"{what}/{processes.index()}", True)
        end = time.monotonic() + processes.PREPARING
        while len(here := processes.published(what)) < processes.count():
            signals.check(self.waiting)
            if time.monotonic() > end:
                raise UserError(f"process {_missing(here)} is not {what} after a day; look into its log")
            time.sleep(0.05)

    def hear(self, name: str, process: int) -> None:
        """Notes the signal that another process received."""
        with self._lock:
            if not self._name:
                log.warning("%s at process %d: stopping, and saving a checkpoint", name, process)
                self._say(name)

    def _heard(self) -> bool:
        """Whether any process received a signal. Tells the others of this process's own."""
        if not self._name and (name := self._asked()):
            self._say(name)
            processes.tell("stop", name)
        return bool(self._name)

    def _say(self, name: str) -> None:
        self._name = name
        processes.publish(f"passed/{processes.index()}", self._passed)

    def _agreed(self) -> bool:
        """Whether all processes stop at the point where this one is."""
        if self._last is None:
            end = time.monotonic() + self._wait
            said: dict[str, int] = {}
            while len(said) < processes.count():
                if time.monotonic() > end:
                    raise UserError(f"process {_missing(said)} does not say how far it is, {self._wait:g} s after "
                                    f"{self._name}; the last checkpoint stands")  # fmt: skip
                said = processes.published("passed")
                time.sleep(0.01)
            self._last = max(said.values())
        return self._passed == self._last


def _missing(here: Container[str]) -> str:
    return ", ".join(number for number in map(str, range(processes.count())) if number not in here)


@contextlib.contextmanager
def stopping(losing: Callable[[], str], grace: float = 0.0) -> Iterator[Stopping]:
    """While inside, signals are noted (see `signals.noted`); yields the `Stopping` to call at each point."""
    with signals.noted(losing, grace) as asked:
        stop = Stopping(asked)
        processes.listeners.append(stop.hear)
        for name, process in list(processes.stops):  # that came before
            stop.hear(name, process)
        try:
            yield stop
            processes.barrier("the end of training")  # until then others may ask how far this one is
        finally:
            processes.listeners.remove(stop.hear)

"""Ends a process in which nothing happens, so that a cluster starts it again: the key `watchdog`."""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from imgclf_jax.core import places, processes
from imgclf_jax.core.text import printable
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.run import stragglers
from imgclf_jax.run.phases import Phases

log = logging.getLogger(__name__)

_SAVING = 5.0  # seconds to write the stacks
_ANSWER = 5.0  # seconds to wait for process 0 to answer
PATIENCE = 6  # times the limit, in phases that may take long without a sign of life
_PATIENT = ("import", "setup", "compile", "checkpoint", "processes")
WAITS_FOR = {
    "setup": "the set-up of the run: its data, its weights or its checkpoint",
    "compile": "the compiler",
    "input": "the next batch: its source or its preprocessing",
    "steps": "the devices to compute",
    "evaluation": "the next batch of an evaluation, or the devices to compute it",
    "checkpoint": "a checkpoint to be saved: the disk",
    "processes": "the other processes",
}


class Watchdog:
    """Watches, inside `watching`, that `phases` are entered, or `beat`, at least every `limit` seconds.

    Else it writes the stacks of all threads to `folder`/hang-PROCESS.txt, and ends the process with status 1 and a line
    that says what it waits for. Of several processes, the line names the one that lags. Set-up, compilation and
    checkpoints may take PATIENCE times the limit. Time in which the process is suspended does not count, up to
    2 * PATIENCE times the limit: a longer suspension may end the process as it continues, by the timer for native code
    that holds the GIL, which cannot tell the two apart. A `limit` of 0 ends nothing. Of several processes, the log
    names those that the others wait for: see `stragglers`.
    """

    def __init__(self, limit: float, folder: Path, phases: Phases):
        self._limit, self._folder, self._phases = limit, folder, phases
        self._poll = min(5.0, max(0.05, limit / 10)) if limit else 5.0
        self._ended = threading.Event()
        self._readings: dict[int, stragglers.Reading] = {}  # a minute ago
        self._compared = -stragglers.EVERY

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches while inside."""
        if not self._limit and processes.count() == 1:
            yield
            return
        # A separate thread publishes, since it hangs if process 0 does.
        targets = {"watchdog": self._watch} if self._limit else {}
        if processes.count() > 1:
            targets["alive"] = self._publish
        threads = [threading.Thread(target=target, name=name, daemon=True) for name, target in targets.items()]
        self._phases.beat()
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(_ANSWER)
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        alive, silent, last = self._phases.alive, 0.0, time.monotonic()
        while not self._ended.wait(self._poll):
            # The time that a suspended process sleeps through is no hang.
            now = time.monotonic()
            silent, last = silent + min(now - last, 2 * self._poll), now
            if self._phases.alive != alive:
                alive, silent = self._phases.alive, 0.0
            phase = self._phases.phase
            limit = self._limit * (PATIENCE if phase in _PATIENT else 1)
            if sys.__stderr__ is not None and sys.__stderr__.fileno() == 2:
                # If native code hangs with the GIL, this thread hangs too, and then a timer in C ends the process.
                faulthandler.dump_traceback_later(2 * PATIENCE * self._limit, exit=True, file=2)
            if silent > limit and self._phases.alive == alive:
                self._end(phase, silent)

    def _end(self, phase: str, seconds: float) -> None:
        waits_for = WAITS_FOR.get(phase, phase)
        line = (f"nothing has happened for {seconds:.0f} s (watchdog) after step {self._phases.step}: the process "
                f"waits for {waits_for}{self._others()}")  # fmt: skip
        file, saved = self._folder / f"hang-{processes.index()}.txt", threading.Event()
        stacks = format_stacks()

        def save() -> None:  # in a thread: the disk may be what hangs
            places.write_atomically(file, f"{line}\n\n{stacks}")
            saved.set()

        threading.Thread(target=save, name="hang", daemon=True).start()
        where = f"the stacks of all threads are in {printable(str(file))}"
        if not saved.wait(_SAVING):
            log.error("%s", stacks)
            where = "the stacks of all threads are above, since the work directory cannot be written"
        _leave(f"error: {line}; {where}; run the same command again")

    def _publish(self) -> None:
        """Publishes, in a thread, that this process lives and how far it is; process 0 also reads it of all."""
        number = 0
        while not self._ended.wait(self._poll):
            number += 1
            seconds = self._phases.seconds
            said = {"step": self._phases.step, "phase": self._phases.phase, "number": number,
                    "host": seconds["input"] + seconds["other"], "steps": seconds["steps"]}  # fmt: skip
            with contextlib.suppress(Exception):  # the service may be what has ended
                processes.publish(f"alive/{processes.index()}", said)
                if not processes.index():
                    everyone = processes.published("alive")
                    self._find_stragglers(everyone)

    def _find_stragglers(self, everyone: JsonObject) -> None:
        """Logs, once a minute, the processes that the others wait for."""
        now = time.monotonic()
        if now - self._compared < stragglers.EVERY:
            return
        readings = {
            int(name): stragglers.Reading(said["step"], said["host"], said["steps"]) for name, said in everyone.items()
        }
        for sentence in stragglers.describe(stragglers.find(self._readings, readings), processes.named):
            log.warning("%s", sentence)
        self._readings, self._compared = readings, now

    def _others(self) -> str:
        """Which other processes are stopped, or behind this one, in words."""
        if processes.count() == 1:
            return ""
        found: list[JsonObject] = []

        def ask() -> None:  # in a thread: process 0, which answers, may be what hangs
            with contextlib.suppress(Exception):
                before = processes.published("alive")
                time.sleep(3 * self._poll)
                found.extend([before, processes.published("alive")])

        asking = threading.Thread(target=ask, name="hang", daemon=True)
        asking.start()
        asking.join(3 * self._poll + _ANSWER)
        if not found:
            return "; process 0 gives no sign of life"
        before, now = found
        others = {name: said for name, said in now.items() if name != str(processes.index())}
        if stopped := [name for name, said in others.items() if said == before.get(name)]:
            return f"; process {', '.join(sorted(stopped, key=int))} gives no sign of life"
        behind = sorted((said["step"], int(name), said["phase"]) for name, said in others.items())
        if behind and behind[0][0] < self._phases.step:
            step, name, phase = behind[0]
            return f"; process {name} is behind, at step {step}, where it waits for {WAITS_FOR.get(phase, phase)}"
        return f"; the others wait for {', '.join(sorted({WAITS_FOR.get(p, p) for _, _, p in behind}))}"


def _leave(line: str) -> NoReturn:
    os.write(2, f"{line}\n".encode())
    os._exit(1)


def format_stacks() -> str:
    """The Python stacks of all other threads of this process, as text."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    )

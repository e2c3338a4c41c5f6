"""Where the time of a training process goes, phase by phase, and the watchdog that ends it if a phase hangs."""

import faulthandler
import os
import sys
import time
from pathlib import Path

PHASES = ("import", "setup", "compile", "input", "steps", "evaluation", "checkpoint", "other")
PATIENCE = 6  # times the watchdog's limit, in phases that may take long
_PATIENT = ("setup", "compile", "checkpoint")


class Timer:
    """Counts the seconds that this process spends in each of PHASES; they add up to its wall time.

    Time before this object was made counts as "import". With a `limit` in seconds, a timer in C ends the process with
    status 1, and writes the stacks of all threads to standard error, unless `enter` is called within the limit. In
    set-up, compilation and checkpoints PATIENCE times the limit may pass.
    """

    def __init__(self, limit: float = 0.0):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.seconds["import"] = _age()
        self.phase, self._limit = "", limit
        self._made = self._since = time.monotonic()
        self._armed = False
        self._steps, self._before = 0, dict(self.seconds)
        self.enter("setup")

    def enter(self, phase: str) -> None:
        """Begins a phase, or tells the watchdog that it goes on."""
        now = time.monotonic()
        if self.phase:
            self.seconds[self.phase] += now - self._since
        self.phase, self._since = phase, now
        if self._limit and sys.__stderr__ is not None:
            limit = self._limit * (PATIENCE if phase in _PATIENT else 1)
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)

    def stop(self) -> None:
        """Ends the watchdog."""
        faulthandler.cancel_dump_traceback_later()

    @property
    def since_made(self) -> float:
        """The seconds since the command began."""
        return time.monotonic() - self._made

    def total(self) -> dict[str, float]:
        """The seconds by phase until now, without the phases that took none."""
        self.enter(self.phase)
        return {name: round(seconds, 3) for name, seconds in self.seconds.items() if seconds}

    def restart_lap(self) -> None:
        """Begins a lap; the time and the steps so far belong to none."""
        self._before, self._steps = dict(self.seconds), 0


def _age() -> float:
    """The seconds since this process began; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), after the boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0

"""Where the time of a training process goes, phase by phase: for goodput, and for the watchdog."""

import os
import time
from pathlib import Path

PHASES = ("import", "setup", "compile", "input", "steps", "evaluation", "checkpoint", "processes", "other")


class Phases:
    """The seconds that this process has spent in each of PHASES. They add up to its wall time.

    Time before this object was made counts as "import". All methods are called by the training thread; another thread
    may read `phase`, `step` and `alive`.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.seconds["import"] = seconds_since_start()
        self.began = round(time.time() - self.seconds["import"], 3)  # Unix time of the attempt that `totals` counts
        self._before = dict.fromkeys(PHASES, 0.0)  # the seconds of earlier attempts
        self.phase, self.step = "setup", 0
        self.alive = self._since = self._made = time.monotonic()  # `alive`: when the thread was last heard of

    def enter(self, phase: str, step: int | None = None, counted_as: str = "") -> None:
        """Begins a phase, after `step` steps. The one that ends is counted as `counted_as` if that is given."""
        now = time.monotonic()
        self.seconds[counted_as or self.phase] += now - self._since
        self.step = self.step if step is None else step
        self.phase, self._since, self.alive = phase, now, now

    def beat(self) -> None:
        """Tells the watchdog that the phase goes on."""
        self.alive = time.monotonic()

    @property
    def since_main(self) -> float:
        """The seconds since this object was made, at the start of the command."""
        return time.monotonic() - self._made

    def begin_attempt(self) -> None:
        """Begins the set-up of another attempt of this process to train: `totals` counts from here on."""
        self.began = round(self.began + sum(self.totals().values()), 3)
        self._before = dict(self.seconds)
        self.enter("setup")

    def totals(self) -> dict[str, float]:
        """The seconds of this attempt by phase until now, rounded to milliseconds."""
        self.enter(self.phase)
        return {name: round(seconds - self._before[name], 3) for name, seconds in self.seconds.items()}


def seconds_since_start() -> float:
    """The age of this process; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), after the boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0

"""Where the time of a training process goes: seconds by phase, images a second; and the watchdog of its phases."""

import faulthandler
import sys
import time

PHASES = ("setup", "compile", "input", "steps", "evaluation", "checkpoint", "other")
PATIENCE = 6  # times the watchdog's limit, in phases that may take long
_PATIENT = ("setup", "compile", "checkpoint")


class Timer:
    """Counts the seconds that this process spends in each of PHASES; they add up to the time since it was made.

    With a `limit` in seconds, the process ends with status 1, and the stacks of all threads on standard error, if
    `enter` is not called within it; set-up, compilation and checkpoints may take PATIENCE times the limit. The watchdog
    is a timer in C, so a thread that holds the GIL cannot stop it.
    """

    def __init__(self, limit: float = 0.0):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.steps, self._limit = 0, limit
        self._made = self._since = time.monotonic()
        self._lap, self._lap_steps = dict(self.seconds), 0
        self.phase = "setup"
        self.enter("setup")

    def enter(self, phase: str, counted_as: str = "") -> None:
        """Begins a phase. The one that ends is counted as `counted_as` if that is given."""
        now = time.monotonic()
        self.seconds[counted_as or self.phase] += now - self._since
        self.phase, self._since = phase, now
        if self._limit and sys.__stderr__ is not None:
            limit = self._limit * (PATIENCE if phase in _PATIENT else 1)
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)

    def beat(self) -> None:
        """Tells the watchdog that the phase goes on."""
        self.enter(self.phase)

    def stop(self) -> None:
        """Stops the watchdog."""
        faulthandler.cancel_dump_traceback_later()

    @property
    def since_main(self) -> float:
        """The seconds since this object was made, at the start of the command."""
        return time.monotonic() - self._made

    def restart_lap(self) -> None:
        """Begins a lap of the training loop; the time and the steps so far belong to none."""
        self._lap, self._lap_steps = dict(self.seconds), self.steps

    def lap(self, images_per_step: int) -> dict[str, float]:
        """{"images_per_second", "input_wait"} since the last lap, over the phases "input" and "steps"."""
        self.beat()
        waited, computed = (self.seconds[name] - self._lap[name] for name in ("input", "steps"))
        seconds = max(waited + computed, 1e-9)
        images = (self.steps - self._lap_steps) * images_per_step
        self.restart_lap()
        return {"images_per_second": round(images / seconds, 1), "input_wait": round(waited / seconds, 4)}

    def summary(self) -> list[dict[str, str | float]]:
        """[{"phase": …, "seconds": …}] of the phases that took any time, for result.json."""
        self.beat()
        return [{"phase": name, "seconds": round(seconds, 2)} for name, seconds in self.seconds.items() if seconds]

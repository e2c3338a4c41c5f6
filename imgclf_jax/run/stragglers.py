"""Finds the processes of a run that the others wait for.

In data-parallel training all processes finish a step together, so the wall time of a step says nothing. What a process
takes itself is the time in which its devices wait for its host (input, records), plus the computation of a step, which
is at most what the fastest process spends on it, collectives included. A slow device is not told from a slow network.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

EVERY = 60.0  # seconds between two readings
_FACTOR = 1.5  # times the median
_LEAST = 3  # steps between two readings


@dataclass(frozen=True)
class Reading:
    """What a process has done so far: its steps, and the seconds of its host and in training steps."""

    step: int
    host: float
    steps: float


def find(before: Mapping[int, Reading], now: Mapping[int, Reading]) -> dict[int, tuple[float, float, float]]:
    """The processes that take 1.5 times the median of a step's seconds between two readings.

    Returns {process: (seconds of a step, of which its host, the median)}. The median of an even number of processes is
    the lower of the two in the middle, so one of two can be slow.
    """
    host, devices = {}, []
    for process, reading in now.items():
        if process not in before or (done := reading.step - before[process].step) < _LEAST:
            return {}
        host[process] = (reading.host - before[process].host) / done
        devices.append((reading.steps - before[process].steps) / done)
    seconds = {process: own + min(devices) for process, own in host.items()}
    median = statistics.median_low(seconds.values()) if seconds else 0.0
    return {process: (one, host[process], median) for process, one in sorted(seconds.items()) if one > _FACTOR * median}


def describe(slow: Mapping[int, tuple[float, float, float]], name: Callable[[int], str]) -> list[str]:
    """A sentence for each slow process."""
    return [
        f"{name(process)} takes {one:.3g} s for a step, {one / median:.1f} times the median of all processes: "
        f"{host:.3g} s of it is its input and its host, while the others wait"
        for process, (one, host, median) in slow.items()
        if median > 0
    ]

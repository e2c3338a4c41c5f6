"""Finds the processes of a run that the others wait for.

In data-parallel training all processes finish a step together, so its wall time says nothing. The time that a process
itself needs is its host time (input, records), during which its devices wait, plus the computation, of which the step
time of the fastest process is an upper bound, since it includes collectives. A slow device looks like a slow network.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

EVERY = 60.0  # seconds between two readings
_FACTOR = 1.5  # times the median
_LEAST = 3  # steps between two readings


@dataclass(frozen=True)
class Reading:
    """The progress of a process: its step, its seconds on the host, and its seconds in training steps."""

    step: int
    host: float
    steps: float


def find(before: Mapping[int, Reading], now: Mapping[int, Reading]) -> dict[int, tuple[float, float, float]]:
    """Returns the processes that need over 1.5 times the median time per step between two readings.

    As {process: (seconds per step, of which on the host, median)}. The median of an even number of processes is the
    lower of the two in the middle, so that one of two can be slow.
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
    """Returns a sentence for each slow process."""
    return [
        f"{name(process)} takes {one:.3g} s for a step, {one / median:.1f} times the median of all processes: "
        f"{host:.3g} s of it is its input and its host, while the others wait"
        for process, (one, host, median) in slow.items()
        if median > 0
    ]

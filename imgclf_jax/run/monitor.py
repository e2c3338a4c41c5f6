"""Watches a run while it trains: throughput, progress bar, and a profiler trace of some steps.

`clu.periodic_actions` imports TensorFlow, and counts evaluation and checkpoints as training time.
"""

import collections
import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import jax
from rich import progress

from imgclf_jax.core import places, processes, terminal
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.typing import Batch, PyTree
from imgclf_jax.run.phases import Phases

log = logging.getLogger(__name__)

_MOST_IN_FLIGHT = 4  # steps that the host may be ahead of the device


class Monitor:
    """Watches the training loop of one process; a context manager that stops the progress bar at its end.

    The profiler traces the steps of `profile` = (first, end) into `folder`/profile.
    """

    def __init__(
        self, start: int, total: int, images_a_step: int, profile: tuple[int, int] | None, folder: Path, phases: Phases
    ):
        self.phases = phases
        phases.step = start
        self.throughput = Throughput(images_a_step, phases)
        self.edges: tuple[int, ...] = ()  # the first and last step of the trace, whose edges are waited for
        self._folder = folder / "profile"
        self._in_flight: collections.deque[PyTree] = collections.deque()
        self._bar = _make_bar()
        self._task = self._bar.add_task("train", total=total, completed=start, note="compiling")
        self._note = ""  # the pace of the last window
        if profile and places.in_bucket(folder):
            raise UserError(f"--profile writes to a disk, and {folder} is in a bucket; pass a --workdir on a disk")
        if profile:
            places.check_plain(self._folder)  # JAX creates files there by their names
            first, stop = max(profile[0], start), min(profile[1], total)
            if first < stop:
                self.edges = (first, stop)
            else:
                log.warning("--profile=%d:%d lies outside the steps %d to %d: nothing is traced", *profile, start,
                            total)  # fmt: skip

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def watch(self, batches: Iterable[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        """Yields the steps and batches, and counts the time that the device waits for them, except for the first."""
        batches = iter(batches)
        first = True
        while True:
            self.phases.enter("input")
            item = next(batches, None)
            if item is None:
                self.phases.enter("other")
                return
            idle = not self._in_flight or self._in_flight[-1].is_ready()  # else the device was busy all the time
            self.phases.enter("steps", counted_as="" if idle else "steps")
            if first:
                self.throughput.restart()
            self.throughput.count_step()
            if self.edges and item[0] == self.edges[0] and not processes.index():
                self._wait()
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # one event per Python call would be millions near the start
                jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True, profiler_options=options)
            yield item
            first = False

    def called(self, done: int, result: jax.Array) -> None:
        """Notes that `done` steps were dispatched, and waits if the host is too far ahead of the device.

        `result` is an output array that is not donated.
        """
        self._in_flight.append(result)
        if len(self._in_flight) > _MOST_IN_FLIGHT:
            self._in_flight.popleft().block_until_ready()
        self.phases.enter("steps", done)
        self._bar.update(self._task, completed=done, note=self._note)  # it compiles no more
        if self.edges and done == self.edges[1] and not processes.index():
            self._wait()
            try:
                jax.profiler.stop_trace()
                log.info("steps %d to %d traced into %s", *self.edges, self._folder)
            except (OSError, jax.errors.JaxRuntimeError) as e:  # the run is worth more than its trace
                log.warning("the trace of steps %d to %d could not be written: %s", *self.edges, reason(e))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count as training time."""
        self.phases.enter("other")
        yield
        self.phases.enter("steps")

    def lap(self) -> dict[str, float]:
        """{"images_per_second", "input_wait"} since the last lap; called while paused."""
        pace = self.throughput.lap()
        self._note = f"{pace['images_per_second']:.0f} images/s, {pace['input_wait']:.0%} waiting for input"
        self._bar.update(self._task, note=self._note)
        return pace

    def _wait(self) -> None:
        """Waits until the device has finished all calls."""
        if self._in_flight:
            self._in_flight[-1].block_until_ready()


class Throughput:
    """Images per second, and the fraction of time spent waiting for input, over the phases "input" and "steps"."""

    def __init__(self, batch_size: int, phases: Phases):
        self.batch_size, self._phases = batch_size, phases
        self.seconds, self.steps = 0.0, 0  # over all laps
        self.restart()

    def restart(self) -> None:
        """Begins a lap; the time and the steps so far belong to none."""
        self._before, self._lap_steps = dict(self._phases.seconds), 0

    def count_step(self) -> None:
        """Adds a step to the lap."""
        self._lap_steps += 1

    def lap(self) -> dict[str, float]:
        """{"images_per_second", "input_wait"} of the lap, which ends. Call it in another phase."""
        waited, computed = (self._phases.seconds[name] - self._before[name] for name in ("input", "steps"))
        seconds = max(waited + computed, 1e-9)
        images = self._lap_steps * self.batch_size
        self.seconds, self.steps = self.seconds + seconds, self.steps + self._lap_steps
        self.restart()
        return {"images_per_second": round(images / seconds, 1), "input_wait": round(waited / seconds, 4)}


def _make_bar() -> progress.Progress:
    """A progress bar, which shows nothing unless on a terminal."""
    return progress.Progress(
        progress.BarColumn(),
        progress.TextColumn("step {task.completed}/{task.total}"),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
        console=terminal.console(),
        disable=not terminal.shows_progress(),
    )

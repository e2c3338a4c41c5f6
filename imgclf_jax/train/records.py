"""What a run measures and writes while it trains: metrics, images, digests of the parameters, time, a trace."""

import collections
import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from imgclf_jax import config as configs
from imgclf_jax.augment.ops import to_pixels
from imgclf_jax.core import json_files, processes, terminal
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Batch, PyTree
from imgclf_jax.data import stream
from imgclf_jax.losses import Task
from imgclf_jax.metrics import NO_STEP
from imgclf_jax.run.digests import Digests
from imgclf_jax.run.profiler import Profiler
from imgclf_jax.run.timer import Timer
from imgclf_jax.run.writers import MetricsWriter
from imgclf_jax.step import NONFINITE_STEP, PER_STEP, TrainState, make_inputs
from imgclf_jax.train import display
from imgclf_jax.train.setup import Run

log = logging.getLogger(__name__)

_MAX_IN_FLIGHT = 2  # steps that the host may be ahead of the devices
_SHOWN = 16  # images of the first batch
Results = dict[str, dict[str, float]]  # the metrics of each evaluation set


class Records(contextlib.ExitStack):
    """The open records of `run`, as a context manager; the profiler traces the steps of `profile` = (first, end)."""

    def __init__(self, run: Run, timer: Timer, profile: tuple[int, int] | None = None):
        super().__init__()
        self.timer, self._run, self._warned = timer, run, False
        self._in_flight: collections.deque[Any] = collections.deque()
        self.images_per_step = int(run.config.batch_size) * run.config.num_seeds
        config, folder = run.config, run.workdir.path
        metrics = MetricsWriter(folder, run.start, configs.flatten(config), config.tensorboard, config.writers)
        self.metrics = self.enter_context(contextlib.closing(metrics))
        self.digests = self.enter_context(contextlib.closing(Digests(folder, run.start, run.cadences.last)))
        self._profiler = self.enter_context(contextlib.closing(Profiler(profile, folder)))

    def write_images(self) -> None:
        """Writes the first images that the run trains on, after augmentation and before normalization.

        With several seeds, those of the first. A method with `inputs` uses its own keys, so it trains on other draws.
        """
        run, config, programs = self._run, self._run.config, self._run.programs
        one_seed = dataclasses.replace(programs.stream, num_seeds=1)
        [(_, batch)] = stream.batches(run.images, one_seed, [0], prefetch=0)
        with programs.tracing():
            inputs = jax.jit(make_inputs(programs.recipe.augment(train=True)))
            augmented = np.asarray(inputs(np.uint32(config.seed), np.int32(0), batch)["image"][:_SHOWN])
        self.metrics.write_images(0, {"train/augmented": to_pixels(augmented, config.augment)})

    def watch(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        """Yields each step with its batch; counts the time in which the devices wait for a batch, but for the first."""
        timer, steps = self.timer, self._run.cadences.last - self._run.start
        shown = self.enter_context(contextlib.closing(terminal.track(batches, steps, "training")))
        while True:
            timer.enter("input")
            item = next(shown, None)
            if item is None:
                return timer.enter("other")
            idle = not self._in_flight or self._in_flight[-1].is_ready()  # else the devices were busy all the time
            timer.enter("steps", counted_as="" if idle else "steps")
            if not timer.steps:
                timer.restart_lap()
            self._profiler.before(item[0])
            yield item

    def note_step(self, step: int, state: TrainState, sums: PyTree) -> None:
        """Notes that `step` steps were dispatched, and waits if the host is too far ahead of the devices."""
        self._in_flight.append(sums["steps"])  # an output that is not donated
        if len(self._in_flight) > _MAX_IN_FLIGHT:
            self._in_flight.popleft().block_until_ready()
        self.timer.steps += 1
        self._profiler.after(step, sums["steps"])
        if step in self.digests.edges:
            self.digests.record(step, state.params)

    def refuse_nonfinite(self, sums: dict[str, np.ndarray]) -> None:
        """Raises UserError if `sums`, on the host, record a nonfinite step; writes its examples to nonfinite.json."""
        run, by_seed = self._run, np.atleast_1d(sums[NONFINITE_STEP])
        step, seed = int(by_seed.min()), run.config.seed + int(by_seed.argmin())
        if step == NO_STEP:
            return
        run.checkpoints.wait()
        positions = step * run.config.batch_size + np.arange(run.config.batch_size, dtype=np.int64)
        ids = run.images.sampler.ids(seed, positions).tolist()
        file, names = run.workdir.path / "nonfinite.json", [run.images.source.example_name(i) for i in ids]
        record = {"step": step, "seed": seed, "example_ids": ids, "examples": names}
        processes.broadcast(lambda: json_files.write(file, record))
        good = run.checkpoints.steps()
        kept = f"the last good checkpoint is of step {good[-1]}" if good else "no checkpoint had been saved yet"
        raise UserError(
            f"the loss, gradient or parameters are not finite at step {step}, on the example ids {str(ids[:8])[:-1]}, "
            f"…] (all in {file}); {kept}; inspect those examples, lower the learning rate, set clip=1.0, or skip such "
            "steps: on_bad_step='skip', in a new --workdir"
        )

    def write_training(self, step: int, sums: dict[str, np.ndarray]) -> None:
        """Writes and logs the means of `sums`, on the host, since the last log line."""
        trained, skipped = (int(np.sum(sums.get(name, 0))) for name in ("steps", "skipped"))
        if skipped:
            log.warning("skipped %d of the %d steps since the last log line: their loss, gradient or parameters are "
                        "not finite", skipped, skipped + trained)  # fmt: skip
        means = _means(sums, self._run.programs.recipe.task) | self.timer.lap(self.images_per_step)
        self.metrics.write_scalars(step, {f"train/{name}": value for name, value in means.items()})
        self._log(step, "train", means)

    def write_evaluation(self, step: int, results: Results) -> None:
        """Writes and logs the results of an evaluation, durably: early stopping and the best checkpoint use them."""
        for name, values in results.items():
            if values.keys() - {"examples"}:  # unless its method measures nothing there
                self._log(step, name, values)
        scores = {f"{name}/{key}": value for name, values in results.items() for key, value in values.items()}
        self.metrics.write_scalars(step, scores)
        self.metrics.flush()
        if (best := self._run.checkpoints.best) and not self._warned and not math.isfinite(scores.get(best, 0)):
            self._warned = True
            log.warning("checkpoint.best: %s is %s at step %d, which is never the best", best, scores[best], step)

    def _log(self, step: int, name: str, values: Mapping[str, float]) -> None:
        log.info("%s", display.line(step, len(self._run.images) / self._run.config.batch_size, name, values))

    def save(self, step: int, state: TrainState, sums: PyTree) -> None:
        """Begins to save a checkpoint."""
        self.timer.enter("checkpoint")
        self.metrics.flush()  # so that no checkpoint on disk is ahead of its metrics
        self.digests.record(step, state.params)
        self._run.checkpoints.save(step, {"state": state, "sums": sums})

    def beat(self) -> str:
        """Tells the watchdog that an evaluation goes on; "" as of no signal that stops it."""
        self.timer.beat()
        return ""


def _means(sums: dict[str, np.ndarray], task: Task) -> dict[str, float]:
    """The training metrics to log: means over the examples or steps since the last log line, over all seeds.

    With several seeds, metrics over examples also get their sample standard deviation over seeds, as in
    `metrics.summarize`. Multi-label accuracy is `exact_match`.
    """
    total = {name: np.sum(value).item() for name, value in sums.items()}
    means = {"skipped": total["skipped"]} if "skipped" in total else {}
    if not total["steps"]:  # all were skipped
        return means
    correct = "exact_match" if task is Task.MULTILABEL else "accuracy"
    trained = sums["steps"] > 0  # [seeds], or []
    for name in sorted(sums.keys() - {"steps", "examples", "skipped", NONFINITE_STEP, *PER_STEP}):
        shown = correct if name == "correct" else name
        means[shown] = total[name] / total["examples"]
        if np.count_nonzero(trained) > 1:
            means[f"{shown}_std"] = np.std(sums[name][trained] / sums["examples"][trained], ddof=1).item()
    return means | {name: total[name] / total["steps"] for name in PER_STEP}

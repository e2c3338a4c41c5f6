"""The command `train`. `train` below is the algorithm; what it calls is pure, but for what it writes and saves."""

import concurrent.futures
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import diagnose
from imgclf_jax.commands.evaluate import evaluate_all
from imgclf_jax.commands.train_setup import Run, set_up
from imgclf_jax.core import signals, tree
from imgclf_jax.run import provenance
from imgclf_jax.run.monitor import Monitor
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import MetricsWriter, format_metrics

log = logging.getLogger(__name__)

STOPPED = 75  # EX_TEMPFAIL: stopped by a signal with a checkpoint saved; run the same command again

Results = dict[str, dict[str, float]]  # the metrics of each evaluation set


def main(config: ConfigDict, workdir: Workdir, profile: tuple[int, int] | None = None) -> int:
    """Trains, or resumes, the run in `workdir`; 0 when it is done, 75 when it was stopped by a signal.

    `profile` traces the steps from its first to its second (exclusive). Raises UserError for what the user can fix, and
    for a loss that is not finite.
    """
    began = time.perf_counter()
    run = set_up(config, workdir)
    total = run.cadences.total
    if run.start == total and workdir.result.is_file():
        log.info("this run is done; its result is in %s", workdir.result)
        return 0
    monitor = Monitor(run.start, total, config.batch_size * config.num_seeds, profile, workdir.path)
    writer = MetricsWriter(workdir.path, run.start, config.tensorboard)
    with monitor, contextlib.closing(writer), signals.noted() as stop:
        ended = train(run, monitor, writer, stop, began)
    if ended is None:
        return STOPPED
    state, results = ended
    _report(run, state, results or evaluate_all(run.programs, state, run.evals), monitor, began)
    return 0


def train(
    run: Run, monitor: Monitor, writer: MetricsWriter, stop: Callable[[], str | None], began: float
) -> tuple[Any, Results] | None:
    """The training loop: (the last state, the last evaluation's results), or None where a signal stopped it."""
    config, programs, cadences, checkpoints = run.config, run.programs, run.cadences, run.checkpoints
    state, window, results = run.state, run.window, Results()
    ranges = cadences.ranges(run.start, programs.steps_per_call, monitor.edges)
    chunks = _when_compiled(programs.chunks(run.images, ranges), run.compiled, began)
    for steps, chunk in monitor.watch(chunks):
        state, window = programs.train(state, window, chunk, np.int32(len(steps)))
        monitor.called(steps, window["steps"])
        step, due = steps.stop, cadences.due(steps.stop)
        signal = stop()  # asked once: a signal from here on waits for the next call, and for its checkpoint
        if not (any(due) or signal):
            continue

        done = jax.device_get(window)  # waits for the device
        with monitor.paused():
            checkpoints.poll()
            diagnose.check_finite(done, config, run.images, checkpoints, run.workdir.path)
            if due.log:
                record = _means(done) | monitor.lap()
                writer.write(step, {f"train/{name}": value for name, value in record.items()})
                log.info("step %d: train %s", step, _brief(record))
                window = programs.zero_window()
            scores: dict[str, float] = {}
            if due.eval:
                results = evaluate_all(programs, state, run.evals)
                for name, values in results.items():
                    log.info("step %d: %s %s", step, name, format_metrics(values))
                scores = {f"{name}/{key}": v for name, values in results.items() for key, v in values.items()}
                writer.write(step, scores)
            if due.checkpoint or signal or (due.eval and config.checkpoint.best):
                writer.sync()  # so that no checkpoint on disk is ahead of its metrics
                checkpoints.save(step, {"state": state, "sums": window}, scores)
            if signal and step < cadences.total:
                checkpoints.close()
                log.warning("%s: stopped at step %d, checkpoint saved; run the same command to go on", signal, step)
                return None
    checkpoints.close()
    return state, results


def _when_compiled(
    chunks: Iterable[tuple[range, Any]], compiled: concurrent.futures.Future[float], began: float
) -> Iterator[tuple[range, Any]]:
    """The chunks, the first of them once the program is compiled."""
    for number, one in enumerate(chunks):
        if number == 0:
            log.info("compiled in %.2f s, beside other work; the first step begins %.2f s after the command",
                     compiled.result(), time.perf_counter() - began)  # fmt: skip
        yield one


def _means(window: dict[str, np.ndarray]) -> dict[str, float]:
    """What is logged of a window of steps: means over its examples or steps, of all seeds together."""
    total = {name: np.sum(value).item() for name, value in window.items()}
    return {
        "loss": total["loss"] / total["examples"],
        "accuracy": total["correct"] / total["examples"],
        **{name: total[name] / total["steps"] for name in ("grad_norm", "param_norm", "learning_rate")},
    }


def _brief(record: dict[str, float]) -> str:
    return format_metrics({name: record[name] for name in ("loss", "accuracy", "images_per_second", "input_wait")})


def _report(run: Run, state: Any, results: Results, monitor: Monitor, began: float) -> None:
    """Writes and prints what the run came to."""
    total, pace = run.cadences.total, monitor.throughput
    result = {
        "step": total,
        "epochs": round(total * run.config.batch_size / len(run.images), 4),
        "seconds": round(time.perf_counter() - began, 2),  # of this process, from the start of `main`
        "images_per_second": round(pace.steps * pace.batch_size / max(pace.seconds, 1e-9), 1),
        "params_sha256": tree.sha256(jax.device_get(state.params)),
        **results,
    }
    provenance.write_json(run.workdir.result, result)
    for name, values in results.items():
        print(f"{name}: {format_metrics(values)}")
    print(f"trained {total} steps ({result['epochs']:g} epochs) in {result['seconds']} s; see {run.workdir.path}")

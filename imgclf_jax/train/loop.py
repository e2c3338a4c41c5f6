"""The training loop, the only place that does I/O."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from imgclf_jax.core import processes
from imgclf_jax.core.stopping import Stopped, stopping
from imgclf_jax.core.typing import Batch
from imgclf_jax.step import TrainState
from imgclf_jax.train import recompute
from imgclf_jax.train.evaluation import evaluate_all
from imgclf_jax.train.records import Records, Results
from imgclf_jax.train.setup import Run

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """How a training loop ended: at its last step, early, or by a signal, which then has a name."""

    step: int
    state: TrainState
    results: Results  # of the evaluation of this step; {} if a signal ended the loop
    stopped_early: str  # why; "" if it did not
    signal: str


def train(run: Run, records: Records) -> Outcome:
    """The training loop. A signal before its first step ends the process, and nothing is lost."""
    programs, cadences, checkpoints = run.programs, run.cadences, run.checkpoints
    state, sums, step, results = run.state, run.sums, run.start, None
    stopped = run.stops_early(step)
    ended = step == cadences.total or bool(stopped)  # in an earlier process, whose result is not there
    if step and cadences.due(step).eval and (ended or not records.metrics.evaluated):  # a signal cut it short
        results = evaluate(run, records, step, state)

    batches = _when_compiled(programs.batches(run.images, () if stopped else range(step, cadences.last)), run, records)
    with stopping() as stop:
        for step, batch in records.watch(batches):
            before = (jax.tree.map(jnp.copy, state), sums) if cadences.checks(step) else None
            with jax.transfer_guard("disallow"):  # all that a step takes is on the devices
                state, sums = programs.train(state, sums, batch)
            if before:
                recompute.refuse_difference(step, state, programs.train(*before, batch)[0], checkpoints.describe_latest)
            step += 1
            records.note_step(step, state, sums)
            signal, due = stop(), cadences.due(step)  # a later signal waits for the next step, or ends an evaluation
            if not (any(due) or signal):
                continue

            done = jax.device_get(sums)  # waits for the devices
            records.timer.enter("other")
            checkpoints.poll()
            records.refuse_nonfinite(done)
            if due.log:
                records.write_training(step, done)
                sums = programs.zero_sums()
            if due.eval:
                results = evaluate(run, records, step, state, stop)
                signal = signal or (stop() if results is None else "")
                stopped = run.stops_early(step)
            if due.checkpoint or signal or stopped or (due.eval and run.config.checkpoint.best):
                records.save(step, state, sums)
            if stopped:
                break
            if signal and (step < cadences.total or results is None):
                checkpoints.close()
                return Outcome(step, state, {}, "", signal)
        records.timer.enter("checkpoint")
        checkpoints.close()
    return Outcome(step, state, results or {}, stopped, "")


def evaluate(run: Run, records: Records, step: int, state: TrainState, stop: Callable[[], str] = str) -> Results | None:
    """Evaluates `state` on every set; None if a signal cut it short: then the resumed run repeats it."""
    timer = records.timer
    timer.enter("compile")
    run.eval_compiled.result()
    processes.barrier()  # on CPU, collectives time out after half a minute
    timer.enter("evaluation")
    try:
        results = evaluate_all(run.programs, state, run.evals, lambda: records.beat() or stop())
    except Stopped:
        return None
    finally:
        timer.enter("other")
    if step > run.start or not records.metrics.evaluated:
        records.write_evaluation(step, results)
    return results


def _when_compiled(batches: Iterable[tuple[int, Batch]], run: Run, records: Records) -> Iterator[tuple[int, Batch]]:
    """Returns the batches once the first is read and the program is compiled."""
    batches = iter(batches)
    records.timer.enter("input")
    if first := list(itertools.islice(batches, 1)):
        records.timer.enter("compile")
        run.compiled.result()
        processes.barrier()  # on CPU, collectives time out after half a minute
        run.record_start()  # not before: a start that fails or is interrupted until here changes nothing
        log.info("the first step begins %.2f s after the command", records.timer.since_main)
    return itertools.chain(first, batches)

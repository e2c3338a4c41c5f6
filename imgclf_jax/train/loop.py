"""The command `train`. The function `train` below is the training loop, the only place that does I/O."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax import diagnose
from imgclf_jax.core import processes, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.stopping import STATUS_SAVED, Stopped, stopping
from imgclf_jax.core.terminal import format_metrics
from imgclf_jax.core.text import printable
from imgclf_jax.core.typing import Batch, JsonObject, PyTree
from imgclf_jax.losses import Task
from imgclf_jax.run import digests, early_stopping, writers
from imgclf_jax.run.digests import Digests
from imgclf_jax.run.goodput import TimeRecord
from imgclf_jax.run.monitor import Monitor
from imgclf_jax.run.phases import Phases
from imgclf_jax.run.watchdog import Watchdog
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import MetricsWriter
from imgclf_jax.step import NONFINITE_STEP, PER_STEP, TrainState
from imgclf_jax.train import display, pictures, recompute
from imgclf_jax.train.evaluation import evaluate_all
from imgclf_jax.train.setup import Run, set_up

log = logging.getLogger(__name__)

_MIN_DIVERGED = 10  # steps in a row, all skipped, that end the run
Results = dict[str, dict[str, float]]  # the metrics of each evaluation set


def main(
    config: ConfigDict, workdir: Workdir, profile: tuple[int, int] | None = None, extend: bool = False,
    adjusted: Callable[[Run], Run] = lambda run: run,
    noted: Callable[[int, str], None] = lambda *_: None,
) -> int:  # fmt: skip
    """Trains or resumes the run in `workdir`. Returns 0 when it is done and 75 when a signal stopped it.

    The profiler traces the steps of `profile` = (first, end). With `extend`, a run with another `total` goes on to that
    of `config`. `adjusted` maps the run that was set up to the run to train; if that ends before its total, 75 is
    returned and the last steps are in no checkpoint. `noted` is called with each step of digests.jsonl and its SHA-256.
    Raises UserError for what the user can fix, and for a loss that is not finite.
    """
    phases = Phases()
    watchdog = Watchdog(configs.seconds(config.watchdog, "watchdog"), workdir.path, phases)
    with contextlib.ExitStack() as held:
        processes.broadcast(lambda: held.enter_context(workdir.held()))
        workdir.check_shared()
        held.enter_context(watchdog.watching())
        return _train_from_latest(config, workdir, profile, extend, adjusted, noted, phases)


def _train_from_latest(
    config: ConfigDict, workdir: Workdir, profile: tuple[int, int] | None, extend: bool,
    adjusted: Callable[[Run], Run], noted: Callable[[int, str], None], phases: Phases,
) -> int:  # fmt: skip
    """Trains the run from its latest checkpoint on, see `main`."""
    run = adjusted(set_up(config, workdir, extend))
    if run.start:
        digests.check(workdir, run.start, run.state.params)
    total = run.cadences.total
    ended = run.start == total or bool(_stops_early(run, run.start))
    done = ended and processes.broadcast(lambda: workdir.is_done(total))
    # A run that is done keeps its config, unless that has the total of an extension that has trained no step.
    if ended and run.changed and (run.extended or not done):
        processes.broadcast(lambda: workdir.update_config(config, run.start))
    if done:
        log.info("this run is done; its result is in %s", workdir.result)
        return 0
    if ended or not run.changed:
        processes.broadcast(lambda: workdir.drop_later_result(run.start))
    monitor = Monitor(run.start, total, config.batch_size * config.num_seeds, profile, workdir.path, phases)
    with _open_records(run, noted, phases) as records:
        records.digests.record(run.start, run.state.params)
        shows = config.log_images and processes.count() == 1
        if shows and not run.start:
            first = pictures.first_batch(run.programs, run.images)  # while the program compiles
            records.metrics.write_images(0, first)
        with monitor:
            trained = train(run, monitor, records)
        if trained is None:
            return STATUS_SAVED
        last, state, results, stopped = trained
        results = results or _last_results(run, last, state, phases)
        records.times.update(last, now=True)
        skipped = int(sharding.fetch(state.skipped).sum())
        further = {"skipped": skipped, "stopped_early": stopped, **records.times.summary()}
        _report(run, records.digests.sha256(), results, monitor, last, further)
        if shows:
            highest = pictures.highest_losses(run.programs, state, run.evals, _beating(phases))
            records.metrics.write_images(last, highest)
        return 0


@dataclass(frozen=True)
class Records:
    """What a run writes while it trains."""

    metrics: MetricsWriter
    digests: Digests
    times: TimeRecord


@contextlib.contextmanager
def _open_records(run: Run, noted: Callable[[int, str], None], phases: Phases) -> Iterator[Records]:
    folder, start = run.workdir.path, run.start
    with contextlib.ExitStack() as files:
        records = Records(
            files.enter_context(contextlib.closing(MetricsWriter(folder, start, run.config))),
            files.enter_context(contextlib.closing(Digests(folder, start, run.cadences.last, noted))),
            files.enter_context(contextlib.closing(TimeRecord(folder, start, phases))),
        )
        yield records


def train(run: Run, monitor: Monitor, records: Records) -> tuple[int, TrainState, Results, str] | None:
    """The training loop: (last step, its state, results of the last evaluation, why it stopped early or "").

    None if it ended before.
    """
    config, programs, cadences, checkpoints = run.config, run.programs, run.cadences, run.checkpoints
    state, sums, step = run.state, run.sums, run.start
    results: Results | None = None
    cut_short = run.start and cadences.due(run.start).eval and not records.metrics.evaluated
    if cut_short:  # by a signal, in this evaluation
        results = _evaluate(run, state, run.start, records, monitor)

    stopped = _stops_early(run, run.start)
    steps = () if stopped else range(run.start, cadences.last)
    batches = _when_compiled(programs.batches(run.images, steps), run, monitor)
    with stopping() as stop:
        for current, batch in monitor.watch(batches):
            state, sums = _train(run, state, sums, batch, current)
            step, due = current + 1, cadences.due(current + 1)
            monitor.called(step, sums["steps"])
            signal = stop()  # asked once: a signal from here on waits for the next step, or cuts the evaluation short
            if step in records.digests.edges:
                records.digests.record(step, state.params)
            if not (any(due) or signal):
                continue

            done = jax.device_get(sums)  # waits for the device
            with monitor.paused():
                checkpoints.poll()
                diagnose.refuse_nonfinite(done, config, run.images, checkpoints, run.workdir.path)
                if due.log:
                    _report_skipped(done)
                    means = _means(done, programs.recipe.task) | monitor.lap()
                    records.metrics.write_scalars(step, {f"train/{name}": value for name, value in means.items()})
                    log.info("%s", run.rows.training(step, means))
                    sums = programs.zero_sums()
                if due.eval:
                    with _saved_if_it_fails(run, records, monitor, step, state, sums):
                        results = _evaluate(run, state, step, records, monitor, stop)
                    signal = signal or (stop() if results is None else "")
                    stopped = _stops_early(run, step)
                if due.checkpoint or signal or stopped or (due.eval and config.checkpoint.best):
                    _save(run, records, monitor, step, state, sums)
                records.times.update(step, now=bool(due.checkpoint or signal or stopped))
                if stopped:
                    break
                if signal and (step < cadences.total or results is None):
                    checkpoints.close()
                    log.warning(
                        "%s: stopped at step %d, checkpoint saved; run the same command to continue", signal, step
                    )
                    return None
        monitor.phases.enter("checkpoint", step)
        checkpoints.close()
    return (step, state, results or {}, stopped) if stopped or step == cadences.total else None


def _train(run: Run, state: TrainState, sums: PyTree, batch: Batch, step: int) -> tuple[TrainState, PyTree]:
    """Trains on the batch of step `step`, and once more if that is due to be computed twice. Donates `state`."""
    before = (recompute.copy(state), sums) if run.cadences.checks(step) else None
    state, sums = run.programs.train(state, sums, batch)
    if before:
        again, _ = run.programs.train(*before, batch)
        recompute.refuse_difference(step, state, again, run.checkpoints.describe_latest)
    return state, sums


@contextlib.contextmanager
def _saved_if_it_fails(
    run: Run, records: Records, monitor: Monitor, step: int, state: TrainState, sums: PyTree
) -> Iterator[None]:
    """If the evaluation inside raises, saves the state first. The resumed run repeats the evaluation."""
    try:
        yield
    except Exception:
        if processes.count() == 1:  # all processes save together, and others may still evaluate
            _save(run, records, monitor, step, state, sums)
            run.checkpoints.close()
            log.warning("the evaluation failed; a checkpoint of step %d is saved", step)
        raise


def _save(run: Run, records: Records, monitor: Monitor, step: int, state: TrainState, sums: PyTree) -> None:
    monitor.phases.enter("checkpoint", step)
    records.metrics.flush()  # so that no checkpoint on disk is ahead of its metrics
    records.digests.record(step, state.params)
    run.checkpoints.save(step, {"state": state, "sums": sums})


def _report_skipped(done: dict[str, np.ndarray]) -> None:
    """Warns of the skipped steps in the sums since the last log line; raises UserError if all of many were skipped."""
    trained, skipped = (int(np.sum(done.get(name, 0))) for name in ("steps", "skipped"))
    if skipped and not trained and skipped >= _MIN_DIVERGED:
        raise UserError(f"all {skipped} steps since the last log line were skipped, since their loss, gradient or "
                        "parameters are not finite: the run has diverged, or its data are damaged; lower the learning "
                        "rate, or set clip=1.0")  # fmt: skip
    if skipped:
        log.warning("skipped %d of the %d steps since the last log line: their loss, gradient or parameters are not "
                    "finite", skipped, skipped + trained)  # fmt: skip


def _evaluate(
    run: Run, state: TrainState, step: int, records: Records, monitor: Monitor,
    stop: Callable[[], str] = str,
) -> Results | None:  # fmt: skip
    """Evaluates, logs and writes the metrics; None if a signal cut it short: then the resumed run repeats it."""
    phases = monitor.phases
    try:
        phases.enter("compile", step)
        run.eval_compiled.result()
        phases.enter("processes")
        processes.barrier()  # on CPU, collectives time out after half a minute
        phases.enter("evaluation")
        results = evaluate_all(run.programs, state, run.evals, _beating(phases, stop))
    except Stopped:
        return None
    finally:
        phases.enter("other")
    for row in run.rows.evaluations(step, results):
        log.info("%s", row)
    records.metrics.write_scalars(step, _scores(results))
    records.metrics.flush()  # early stopping and the best checkpoint follow from it
    return results


def _stops_early(run: Run, step: int) -> str:
    return early_stopping.find_reason(run.early_stopping, run.cadences, run.workdir.path, step)


def _beating(phases: Phases, stop: Callable[[], str] = str) -> Callable[[], str]:
    """`stop`, which also tells the watchdog that an evaluation goes on."""

    def beat_and_ask() -> str:
        phases.beat()
        return stop()

    return beat_and_ask


def _scores(results: Results) -> dict[str, float]:
    return {f"{name}/{key}": value for name, values in results.items() for key, value in values.items()}


def _last_results(run: Run, last: int, state: TrainState, phases: Phases) -> Results:
    """The final results of a run whose last evaluation was in an earlier process.

    They are those in metrics.jsonl, since an evaluation on other devices differs by rounding. But an evaluation of the
    last state decides whether they are this run's.
    """
    phases.enter("compile")
    run.eval_compiled.result()
    phases.enter("evaluation")
    found = evaluate_all(run.programs, state, run.evals, _beating(phases))
    recorded: Results | None = processes.broadcast(lambda: _recorded(run, last))
    if not recorded:
        return found
    for name, own in found.items():
        for key, value in own.items():
            tolerance = 0.0 if key in ("loss", "nll") else 1.5 / own["examples"]  # one example, on other devices
            before = recorded[name].get(key)
            if not isinstance(before, int | float) or not np.isclose(before, value, 1e-3, tolerance, equal_nan=True):
                log.warning("%s says %s/%s %s, but the checkpoint of step %d has %.6g, which goes into the result; is "
                            "the file another run's?", run.workdir.metrics, name, key, before, last, value)  # fmt: skip
                return found
    return recorded


def _recorded(run: Run, last: int) -> Results | None:
    """The final results that an earlier process wrote to metrics.jsonl; None if there are none."""
    values: dict[str, float] = {}
    for record in writers.read_metrics(run.workdir.metrics):
        values |= record if record["step"] == last else {}
    found = {name: {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
             for name in run.evals}  # fmt: skip
    return found if all("examples" in own for own in found.values()) else None


def _when_compiled(
    batches: Iterable[tuple[int, Batch]], run: Run, monitor: Monitor
) -> Iterator[tuple[int, Batch]]:  # fmt: skip
    """Returns the batches once the first is read and the program is compiled. A signal until then ends the process."""
    batches = iter(batches)
    monitor.phases.enter("input")
    if first := list(itertools.islice(batches, 1)):
        monitor.phases.enter("compile")
        seconds = run.compiled.result()
        monitor.phases.enter("processes")
        processes.barrier()  # on CPU, collectives time out after half a minute
        if run.changed:  # not before: an extension that fails or is interrupted until here changes nothing
            processes.broadcast(lambda: _record_change(run))
        log.info("compiled in %.2f s; the first step begins %.2f s after the command", seconds,
                 monitor.phases.since_main)  # fmt: skip
        log.info("%s", run.rows.header())
    return itertools.chain(first, batches)


def _record_change(run: Run) -> None:
    run.workdir.update_config(run.config, run.start)
    run.workdir.drop_later_result(run.start)


def _means(sums: dict[str, np.ndarray], task: Task) -> dict[str, float]:
    """The training metrics to log: means over the examples or steps since the last log line, over all seeds.

    With several seeds, metrics over examples also get their sample standard deviation over seeds, as in
    `metrics.summarize`. Multi-label accuracy is `exact_match`; regression has none.
    """
    total = {name: np.sum(value).item() for name, value in sums.items()}
    own = sorted(total.keys() - {"steps", "examples", "loss", "correct", "skipped", NONFINITE_STEP, *PER_STEP})
    right = {"exact_match" if task is Task.MULTILABEL else "accuracy": "correct"} if "correct" in total else {}
    of_examples = {"loss": "loss", **right, **{name: name for name in own}}
    means = {"skipped": total["skipped"]} if "skipped" in total else {}
    if not total["steps"]:  # all were skipped
        return means
    means |= {name: total[summed] / total["examples"] for name, summed in of_examples.items()}
    means |= {name: total[name] / total["steps"] for name in PER_STEP}
    trained = sums["steps"] > 0  # [seeds], or []
    if np.count_nonzero(trained) > 1:
        for name, summed in of_examples.items():
            each = sums[summed][trained] / sums["examples"][trained]
            means[f"{name}_std"] = np.std(each, ddof=1).item()
    return means


def _report(run: Run, digest: str, results: Results, monitor: Monitor, total: int, further: JsonObject) -> None:
    """Writes result.json and prints the results. `total` is the last step. Empty values of `further` are left out."""
    pace = monitor.throughput
    result = {
        "step": total,
        "epochs": round(total * run.config.batch_size / len(run.images), 4),
        "seconds": round(monitor.phases.since_main, 2),  # of this process, from the start of `main`
        "images_per_second": round(pace.steps * pace.batch_size / pace.seconds, 1) if pace.steps else None,
        "params_sha256": digest,
        **{name: value for name, value in further.items() if value},
        **results,
    }
    if processes.index():
        return
    run.workdir.write_result(result)
    if further["stopped_early"]:
        print(f"stopped early: {further['stopped_early']}")
    for name, values in results.items():
        print(f"{name}: {format_metrics(values)}")
    trained = f"the last {total - run.start} of {total}" if run.start else str(total)
    print(f"trained {trained} steps ({result['epochs']:g} epochs) in {result['seconds']} s; see "
          f"{printable(str(run.workdir.path))}")  # fmt: skip
    print(*display.next_commands(str(run.workdir.path), run.programs.recipe.method.predicts), sep="\n")

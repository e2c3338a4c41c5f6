"""What a run leaves at its end: result.json and the lines that it prints."""

import logging

import numpy as np

from imgclf_jax.core import json_files, processes, sharding
from imgclf_jax.core.terminal import format_metrics
from imgclf_jax.core.text import printable
from imgclf_jax.run import writers
from imgclf_jax.step import TrainState
from imgclf_jax.train import display
from imgclf_jax.train.evaluation import evaluate_all
from imgclf_jax.train.loop import Outcome
from imgclf_jax.train.records import Records, Results
from imgclf_jax.train.setup import Run

log = logging.getLogger(__name__)


def is_done(run: Run) -> bool:
    """Whether nothing is left to train, and the result is there. Records a changed config that trains no step."""
    workdir = run.workdir
    ended = run.start == run.cadences.total or bool(run.stops_early(run.start))
    done: bool = ended and processes.broadcast(lambda: workdir.is_done(run.cadences.total))
    # A run that is done keeps its config, unless that has the total of an extension that has trained no step.
    if ended and run.changed and (run.extended or not done):
        processes.broadcast(lambda: workdir.record(run.config, run.snapshot, run.start))
    if not done and (ended or not run.changed):
        processes.broadcast(lambda: workdir.drop_later_result(run.start))
    return done


def write(run: Run, records: Records, outcome: Outcome) -> None:
    """Writes result.json and prints the results. All processes call this."""
    step, timer = outcome.step, records.timer
    results = outcome.results or _last_results(run, records, step, outcome.state)
    skipped = int(sharding.fetch(outcome.state.skipped).sum())
    seconds, steps = timer.seconds["input"] + timer.seconds["steps"], timer.steps
    result = {
        "step": step,
        "epochs": round(step * run.config.batch_size / len(run.images), 4),
        "seconds": round(timer.since_main, 2),  # of this process, from the start of `main`
        "images_per_second": round(steps * records.images_per_step / seconds, 1) if steps else None,
        "params_sha256": records.digests.sha256(),
        **({"skipped": skipped} if skipped else {}),
        **({"stopped_early": outcome.stopped_early} if outcome.stopped_early else {}),
        "time": timer.summary(),
        **results,
    }
    if processes.index():
        return
    json_files.write(run.workdir.result, result)
    if outcome.stopped_early:
        print(f"stopped early: {outcome.stopped_early}")
    for name, values in results.items():
        print(f"{name}: {format_metrics(values)}")
    trained = f"the last {step - run.start} of {step}" if run.start else str(step)
    print(f"trained {trained} steps ({result['epochs']:g} epochs) in {result['seconds']} s; see "
          f"{printable(str(run.workdir.path))}")  # fmt: skip
    print(*display.next_commands(str(run.workdir.path), run.programs.recipe.method.predicts), sep="\n")


def _last_results(run: Run, records: Records, last: int, state: TrainState) -> Results:
    """The final results of a run whose last evaluation was in an earlier process.

    They are those in metrics.jsonl, since an evaluation on other devices differs by rounding. But an evaluation of the
    last state decides whether they are this run's.
    """
    records.timer.enter("compile")
    run.eval_compiled.result()
    records.timer.enter("evaluation")
    found = evaluate_all(run.programs, state, run.evals, records.beat)
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

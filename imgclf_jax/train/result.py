"""What a run leaves at its end: result.json and the lines that it prints."""

import logging
import shlex

from imgclf_jax.cli.table import COMMANDS
from imgclf_jax.core import json_files, processes, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.terminal import format_metrics
from imgclf_jax.core.text import printable
from imgclf_jax.train import display
from imgclf_jax.train.loop import Outcome
from imgclf_jax.train.records import Records
from imgclf_jax.train.setup import Run

log = logging.getLogger(__name__)


def is_done(run: Run) -> bool:
    """Whether nothing is left to train, and the result is there. A run that is done keeps its config."""
    ended = run.start == run.cadences.total or bool(run.stops_early(run.start))
    done: bool = ended and processes.broadcast(lambda: run.workdir.is_done())
    if ended and not done:
        run.record_start()
    return done


def write(run: Run, records: Records, outcome: Outcome) -> None:
    """Writes result.json and prints the results, in all processes. Raises UserError if a seed skipped all its steps."""
    step, timer = outcome.step, records.timer
    skipped = sharding.fetch(outcome.state.skipped)
    if step and (skipped == step).any():
        raise UserError(f"all {step} steps were skipped: their loss, gradient or parameters are not finite, so nothing "
                        "was trained; on_bad_step=stop names the examples of the first")  # fmt: skip
    seconds, steps = timer.seconds["input"] + timer.seconds["steps"], timer.steps
    result = {
        "step": step,
        "epochs": round(step * run.config.batch_size / len(run.images), 4),
        "seconds": round(timer.since_main, 2),  # of this process, from the start of `main`
        "images_per_second": round(steps * records.images_per_step / seconds, 1) if steps else None,
        "params_sha256": records.digests.sha256(),
        **({"skipped": int(skipped.sum())} if skipped.any() else {}),
        **({"stopped_early": outcome.stopped_early} if outcome.stopped_early else {}),
        "time": timer.summary(),
        **outcome.results,
    }
    if processes.index():
        return
    json_files.write(run.workdir.result, result)
    if outcome.stopped_early:
        print(f"stopped early: {outcome.stopped_early}")
    for name, values in outcome.results.items():
        print(f"{name}: {format_metrics(values)}")
    trained = f"the last {step - run.start} of {step}" if run.start else str(step)
    print(f"trained {trained} steps ({result['epochs']:g} epochs) in {result['seconds']} s; see "
          f"{printable(str(run.workdir.path))}")  # fmt: skip
    for words in ("report", *(("predict FILE", "serve") if run.programs.recipe.method.predicts else ())):
        if words.split()[0] in COMMANDS:  # a tool may have been deleted
            print(f"  {display.program()} {words} --workdir {shlex.quote(printable(str(run.workdir.path)))}")

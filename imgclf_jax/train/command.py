"""The command `train`: sets a run up, trains it, and writes its result."""

import contextlib
import logging
from collections.abc import Callable

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax import programs
from imgclf_jax.core import processes
from imgclf_jax.core.stopping import STATUS_SAVED
from imgclf_jax.run import digests, writers
from imgclf_jax.run.timer import Timer
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import result
from imgclf_jax.train.loop import train
from imgclf_jax.train.records import Records
from imgclf_jax.train.setup import Run, set_up

log = logging.getLogger(__name__)


def main(
    config: ConfigDict, workdir: Workdir, profile: tuple[int, int] | None = None,
    transform_run: Callable[[Run], Run] = lambda run: run,
) -> int:  # fmt: skip
    """Trains or resumes the run in `workdir`. Returns 0 when it is done and 75 when a signal stopped it.

    The profiler traces the steps of `profile` = (first, end). `transform_run` maps the run that was set up to the run
    to train; if that ends before its total, 75 is returned and the last steps are in no checkpoint. Raises UserError
    for what the user can fix, and for a loss that is not finite.
    """
    programs.check(config)  # before the work directory is made
    if not processes.index():
        writers.find_factories(config.writers, workdir.path, 0)
    timer = Timer(configs.seconds(config.watchdog, "watchdog"))
    with contextlib.ExitStack() as held:
        held.callback(timer.stop)
        processes.broadcast(workdir.refuse_data)
        processes.broadcast(lambda: held.enter_context(workdir.held()))
        workdir.check_shared()
        run = transform_run(set_up(config, workdir))
        if run.start:
            digests.check(workdir, run.start, run.state.params)
        if result.is_done(run):
            log.info("this run is done; its result is in %s", workdir.result)
            return 0
        records = held.enter_context(Records(run, timer, profile))
        records.digests.record(run.start, run.state.params)
        if config.log_images and processes.count() == 1 and not run.start:
            records.write_images()  # while it compiles
        outcome = train(run, records)
        if outcome.signal:
            log.warning("%s: stopped at step %d, checkpoint saved; run the same command to continue", outcome.signal,
                        outcome.step)  # fmt: skip
        if outcome.signal or (outcome.step < run.cadences.total and not outcome.stopped_early):
            return STATUS_SAVED
        result.write(run, records, outcome)
        return 0

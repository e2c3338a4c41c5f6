"""A trace of some training steps, for TensorBoard or Perfetto: the flag `--profile`."""

import logging
from pathlib import Path

import jax

from imgclf_jax.core import paths, processes
from imgclf_jax.core.errors import UserError, reason

log = logging.getLogger(__name__)


class Profiler:
    """Traces the steps first to last (exclusive) of `steps` into `folder`/profile, in process 0.

    Raises UserError for a folder in a bucket. With `steps` None it does nothing.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps, self._folder, self._running = steps, folder / "profile", False
        if steps and paths.in_bucket(folder):
            raise UserError(f"--profile writes to a disk, and {folder} is in a bucket; pass a --workdir on a disk")
        if steps:
            paths.check_plain(self._folder)  # JAX creates files there by their names

    def before(self, step: int) -> None:
        """Call it before step `step` is dispatched."""
        if self._steps and self._steps[0] <= step < self._steps[1] and not self._running and not processes.index():
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # one event per Python call would be millions near the start
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True, profiler_options=options)
            self._running = True

    def after(self, step: int, result: jax.Array) -> None:
        """Call it after `step` steps, of the last of which `result` is an output."""
        if self._running and self._steps and step >= self._steps[1]:
            result.block_until_ready()
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is running: also when the run ends before its last step."""
        if self._running:
            self._running = False
            try:
                jax.profiler.stop_trace()
                log.info("the trace is in %s", self._folder)
            except (OSError, jax.errors.JaxRuntimeError) as e:  # the run is worth more than its trace
                log.warning("the trace could not be written in %s: %s", self._folder, reason(e))

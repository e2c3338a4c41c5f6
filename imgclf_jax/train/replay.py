"""Detects silent data corruption by computing a step twice from the same state and comparing every bit.

A step is a pure function of the state and of (seed, step), so two results differ only if a device computed wrongly, its
memory lost a bit, or a kernel is nondeterministic. The replicas of each array are compared as well. In practice,
recomputation finds such faults: arXiv:2502.12340.
"""

import logging
import time
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import metrics
from imgclf_jax.core import processes, sharding
from imgclf_jax.core.checksums import Checksums
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Chunk
from imgclf_jax.run import writers
from imgclf_jax.run.skipped import forget_left_out
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.step import TrainState
from imgclf_jax.train.setup import Run

log = logging.getLogger(__name__)

_MOST = 3  # mismatches in one process before it stops: a device that keeps failing must be replaced
_VERDICT = "a device computed wrongly or lost a bit, or a kernel is nondeterministic"


class Again(Exception):
    """Training continues from the latest checkpoint, in the same process."""


class Replays:
    """Replays steps of a run, over all its attempts in this process. All processes call the methods.

    `suspect` is a bad step that has been computed only once.
    """

    def __init__(self, config: ConfigDict, workdir: Workdir):
        self.suspect: int | None = None
        self._confirmed: int | None = None  # the latest step known to be correct
        self._rollback = config.on_corruption == "rollback"
        self._path, self._found = workdir.corruption, 0

    def attach(self, run: Run) -> None:
        """Starts an attempt: `run` trains from its checkpoint, which was verified at restore."""
        self._run = run
        if run.cadences.check is not None:
            # A checkpoint that this process saved after the latest confirmed step is not known to be correct.
            self._confirm(run.start if self._confirmed is None else min(self._confirmed, run.start))
            self._checksums = Checksums(run.programs.state_shape, run.programs.mesh)
            shardings = jax.tree.map(lambda x: x.sharding, run.programs.state_shape)
            self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)

    def train(
        self, state: TrainState, sums: metrics.Sums, chunk: Chunk, steps: range
    ) -> tuple[TrainState, metrics.Sums]:
        """Runs the train program for `steps`, (state, sums) → (state, sums), and replays a step that is due."""
        before = self._copy(state) if self._run.cadences.checks(steps) else None
        state, new = self._run.programs.train(state, sums, chunk, np.int32(len(steps)))
        if before is not None:
            self.check(steps, before, sums, chunk, state)
        return state, new

    def check(self, steps: range, before: TrainState, sums: metrics.Sums, chunk: Chunk, state: TrainState) -> None:
        """Computes the step again from `before`, whose buffers are donated, and compares the result with `state`.

        Raises UserError, or Again after a rollback, if a bit differs.
        """
        began = time.perf_counter()
        again, _ = self._run.programs.train(before, sums, chunk, np.int32(1))
        first, second = self._checksums(state), self._checksums(again)
        differs, replicas = first != second, self._checksums.differing_replicas(first)
        if not (differs | replicas).any():
            self._confirm(steps.stop)
            log.info("step %d computed again in %.2f s: every bit is the same", steps.start,
                     time.perf_counter() - began)  # fmt: skip
            return
        what = "gives other bits when it is computed again" if differs.any() else "leaves replicas with other bits"
        self.corrupted(steps.start, f"{what}: {self._checksums.describe(differs | replicas)}")

    def check_replicas(self, state: TrainState, step: int) -> None:
        """Compares the replicas of a state to save at `step`: a checkpoint holds one of each, and would hide the fault.

        Raises as `check` does.
        """
        if self._run.cadences.check is None or self._run.programs.mesh.size == 1:
            return
        differs = self._checksums.differing_replicas(self._checksums(state))
        if differs.any():
            self.corrupted(step, f"begins with replicas of other bits: {self._checksums.describe(differs)}")

    def check_step_count(self, state: TrainState, step: int) -> None:
        """Compares the state's own count of steps, on each process, with the loop's. Raises as `check` does.

        A state with another count draws other random numbers, and a checkpoint of it cannot be restored.
        """
        own = np.unique(sharding.fetch(state.step)).tolist()
        # Only with `check_every` do the processes go back together; else the one that finds it ends the others.
        every = processes.gather("counts of steps", own) if self._run.cadences.check is not None else [own]
        if wrong := [count for counts in every for count in counts if count != step]:
            self.corrupted(step, f"has a state that counts {wrong[0]} steps")

    def corrupted(self, step: int, what: str) -> NoReturn:
        """Goes back to the latest confirmed state, since the step `what`, or refuses to go on.

        Raises UserError, or Again after a rollback. Without `check_every` no state is confirmed, and it always refuses.
        """
        self._record(step, what)
        if self._run.cadences.check is None:
            self._run.checkpoints.close()
            raise UserError(
                f"step {step} {what}: {_VERDICT}; test the devices, then run the same command on others: it continues "
                f"from {self._latest()} (check_every='1000 steps' finds such faults earlier)"
            )
        forget_left_out(self._run.workdir.path, self._confirmed or 0)
        kept = self._go_back()
        if self._continues():
            log.warning(
                "step %d %s: %s; the run continues from %s, the latest confirmed state", step, what, _VERDICT, kept
            )
            raise Again
        raise UserError(f"step {step} {what}{self._times()}: {_VERDICT}; test the devices, then run the same command "
                        f"on others: it continues from {kept} (all findings are in {self._path})")  # fmt: skip

    def recheck(self, bad: int | None, step: int) -> str:
        """Returns in words what recomputing a bad step showed, once training is at `step`; "" if nothing yet.

        `bad` is the bad step found now, if any. Raises Again if it has been computed only once.
        """
        if self._run.cadences.check is None:
            return ""
        suspect = self.suspect
        if suspect is not None and bad != suspect and (bad is not None or step > suspect):
            self.suspect = None
            what = "was bad, and is not when it is computed again"
            self._record(suspect, what)
            if not self._continues():
                raise UserError(
                    f"step {suspect} {what}{self._times()}: {_VERDICT}; run the same command on other devices: it "
                    f"continues from {self._go_back()}; or add on_corruption='rollback'"
                )
        if bad is not None and bad == suspect:
            self.suspect = None
            return "computed twice with the same result, so the data or the optimization are to blame; "
        if bad is not None:
            self.suspect = bad
            log.warning("step %d is bad: computing it again from %s, to tell whether the hardware is to blame", bad,
                        self._go_back())  # fmt: skip
            raise Again
        return ""

    def _confirm(self, step: int) -> None:
        self._confirmed = step
        self._run.checkpoints.confirm(step)

    def _go_back(self) -> str:
        """Removes the checkpoints after the last confirmed step; says where the run continues."""
        checkpoints = self._run.checkpoints
        checkpoints.drop_after(self._confirmed or 0)
        checkpoints.close()
        return self._latest()

    def _latest(self) -> str:
        latest = self._run.checkpoints.latest
        return f"the checkpoint of step {latest}" if latest else "the beginning"

    def _continues(self) -> bool:
        return self._rollback and self._found < _MOST

    def _times(self) -> str:
        return f" ({self._found} times in this process)" if self._found > 1 else ""

    def _record(self, step: int, what: str) -> None:
        self._found += 1
        if not processes.index():
            file = writers.RecordFile(self._path, writers.read_metrics(self._path))
            file.write({"step": step, "found": what, "at": time.time()})
            file.flush()
            file.close()

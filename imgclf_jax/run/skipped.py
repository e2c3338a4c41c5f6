"""skipped.jsonl: the steps without an update, because a value was not finite or the loss spiked. See `bad_steps`.

- {"step": 41, "seed": 0, "loss": 9.7, "reason": "spike"} is a step that was skipped. The loss is null if it, the
  gradient or the parameters were not finite.
- {"step": 100, "until": 300, "bad_step": 299, "reason": "not finite"} is a rollback: the run left out steps 100 to 299,
  and trained step 300 from the state of step 100.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imgclf_jax.bad_steps import RECENT, Guard
from imgclf_jax.core import processes, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import JsonMapping, JsonObject
from imgclf_jax.run import writers

log = logging.getLogger(__name__)

NAME = "skipped.jsonl"


class Impossible(Exception):
    """The state counts skipped steps that no run can have: a device computed wrongly, or its memory lost a bit."""


class Rollback(Exception):
    """The run leaves out the steps `first` to `until` - 1, and continues from the state of step `first`."""

    def __init__(self, first: int, until: int, bad_step: int, reason: str):
        super().__init__(f"step {bad_step} is bad ({reason})")
        self.first, self.until, self.bad_step, self.reason = first, until, bad_step, reason


def read(folder: Path) -> list[JsonObject]:
    """The lines of skipped.jsonl in `folder`; [] without one. Raises UserError if one has no number of a step."""
    lines = writers.read_metrics(folder / NAME)
    if any(type(line.get(key, 0)) is not int for line in lines for key in ("until", "bad_step")):
        raise UserError(f"{folder / NAME} is damaged: the step in a line is not a whole number; restore the file "
                        "from a copy of the run")  # fmt: skip
    return lines


def read_left_out(folder: Path) -> list[tuple[int, int]]:
    """Returns the ranges (first, until) of steps that rollbacks left out, ascending. All processes call this."""
    return [
        (first, until)
        for first, until in processes.broadcast_from_process_0(
            f"reading {NAME}",
            lambda: sorted([line["step"], line["until"]] for line in read(folder) if "until" in line),
        )
    ]


def forget_left_out(folder: Path, step: int) -> None:
    """Removes the steps that the run in `folder` left out for a bad step at or after `step`. All processes call this.

    A step that a faulty device made bad is computed again, and left out again if it is still bad.
    """
    if not processes.index():
        lines = read(folder)
        kept = [line for line in lines if line.get("bad_step", -1) < step]
        if len(kept) < len(lines):
            writers.RecordFile(folder / NAME, kept).close()


class Skipped:
    """Writes skipped.jsonl in `folder` for a run that continues from step `start` with the state's `guard`.

    Lines of steps skipped at `start` or later are dropped, since training writes them again. All processes call the
    methods; process 0 writes. The first line creates the file.
    """

    def __init__(self, folder: Path, start: int, guard: Guard | None, seed: int):
        self.left_out = dict(read_left_out(folder))  # first step of a range → the step after the range
        self._path, self._seed = folder / NAME, seed
        self._file: writers.RecordFile | None = None
        self._known = _fetch(guard)[0] if guard is not None else np.zeros(1, int)
        self._step = start
        lines = read(folder) if not processes.index() else []
        if lines:
            self._write([], kept=[line for line in lines if "until" in line or line["step"] < start])

    def note(self, guard: Guard, step: int) -> int | None:
        """Records the steps skipped since the last call, of a run that is at `step`.

        Returns the latest if they are more than the guard remembers: such a run has diverged. Raises Impossible, and
        records nothing, if they are more than the steps since the last call, or other steps.
        """
        own = [x.tolist() for x in _fetch(guard)]
        # Process 0 decides, since a bit may be lost in the replica of one. [seeds], [seeds, RECENT], [seeds, RECENT]
        skipped, steps, losses = map(np.asarray, processes.broadcast_from_process_0("skipped steps", lambda: own))
        new, since = skipped - self._known, range(self._step, step)
        if (new < 0).any() or (new > len(since)).any():
            raise Impossible(f"counts {', '.join(map(str, new))} skipped steps in {len(since)}")
        lines = []
        for seed in np.flatnonzero(new):
            places = (skipped[seed] - 1 - np.arange(min(new[seed], RECENT))) % RECENT
            lines += [_line(int(steps[seed, i]), self._seed + int(seed), float(losses[seed, i])) for i in places]
        lines.sort(key=lambda line: (line["step"], line["seed"]))
        if wrong := [line["step"] for line in lines if line["step"] not in since]:
            raise Impossible(f"says that step {wrong[0]} was skipped among the steps {since.start} to {step - 1}")
        self._known, self._step = skipped, step
        if lines:
            self._write(lines)
        if lines and new.max() > RECENT:
            return int(lines[-1]["step"])
        for line in lines:
            log.warning("step %d skipped: its loss%s (seed %d); show-batch --step=%d draws its batch", line["step"],
                        ", gradient or parameters are not finite" if line["loss"] is None
                        else f" of {line['loss']:.4g} spikes", line["seed"], line["step"])  # fmt: skip
        return None

    def refuse(self, latest: int, verdict: str) -> None:
        """Raises UserError about a run that skipped more steps than the guard remembers, `latest` the last of them."""
        raise UserError(
            f"more than {RECENT} steps up to step {latest} were skipped since the last log line: {verdict}the run has "
            f"diverged, or its data are damaged (the latest steps are in {self._path}); lower the learning rate, or "
            "set clip=1.0"
        )

    def plan_rollback(self, bad_step: int, steps: int, total: int, reason: str) -> Rollback:
        """Plans to leave out the `steps` up to `bad_step`.

        The range depends on the bad step alone, not on which checkpoints exist. Raises UserError if no step follows it.
        """
        until = bad_step + 1
        if until >= total:
            raise UserError(f"step {bad_step} of {total} is bad ({reason}), and no step follows it, so on_bad_step="
                            "'rollback' would leave out the end of the run; lower the learning rate, or train fewer "
                            "steps")  # fmt: skip
        first = max([0, until - steps, *(end for end in self.left_out.values() if end <= bad_step)])
        return Rollback(first, until, bad_step, reason)

    def leave_out(self, rollback: Rollback) -> None:
        """Records a rollback durably.

        Remove the checkpoints after its first step before the call: a process killed in between resumes, reaches the
        bad step again, and plans the same rollback.
        """
        self._write([{"step": rollback.first, "until": rollback.until, "bad_step": rollback.bad_step,
                      "reason": rollback.reason}])  # fmt: skip

    def _write(self, lines: Sequence[JsonMapping], kept: Sequence[JsonMapping] = ()) -> None:
        """Appends lines durably. The first call makes the file, with the lines `kept` before them."""
        if not processes.index():
            self._file = self._file or writers.RecordFile(self._path, kept)
            for line in lines:
                self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()


def count_skipped(guard: Guard | None) -> int:
    """Counts the skipped steps over all seeds. All processes call this."""
    return 0 if guard is None else int(_fetch(guard)[0].sum())


def _fetch(guard: Guard) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(skipped int[seeds], steps int[seeds, RECENT], losses f32[seeds, RECENT]) on the host."""
    skipped, steps, losses = map(sharding.fetch, (guard.skipped, guard.steps, guard.losses))
    return np.atleast_1d(skipped).astype(int), np.atleast_2d(steps), np.atleast_2d(losses)


def _line(step: int, seed: int, loss: float) -> JsonObject:
    finite = math.isfinite(loss)
    return {"step": step, "seed": seed, "loss": loss if finite else None, "reason": "spike" if finite else "not finite"}

"""Checkpoints. Orbax saves them asynchronously and renames them atomically; this module adds checksums.

A checkpoint holds the train state and the training sums since the last log line. So a resumed run logs the same numbers
as a run that was never interrupted.
"""

import functools
import json
import logging
import math
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError, reason

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"  # {file: [bytes, CRC-32]}; without it nobody would notice a flipped bit in an array
_WORST = -math.inf


class Checkpoints:
    """The checkpoints in `directory`: the latest `keep`, and the best one by the metric `best` ("" for none).

    A loss is best when it is low, every other metric when it is high. A value that is not finite is the worst.
    """

    def __init__(self, directory: Path, keep: int = 2, best: str = "", read_only: bool = False):
        self.directory = directory.resolve()
        self.best = best
        self._read_only = read_only
        self._sign = -1.0 if best.endswith("loss") else 1.0
        policy: list[Any] = [policies.LatestN(keep)]
        if best:
            keep_best = policies.BestN(get_metric_fn=self._value, n=1, keep_checkpoints_without_metrics=False)
            policy.append(keep_best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(policy),
            best_fn=self._value if best else None,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        handler = ocp.StandardCheckpointHandler()  # named, so that metadata can be read too
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handler)

    def _value(self, metrics: Mapping[str, float]) -> float:
        """A number that is greater for a better checkpoint. It is never NaN, so that numbers can be sorted by it."""
        value = metrics.get(self.best, math.nan)
        return self._sign * value if math.isfinite(value) else _WORST

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of the best checkpoint; None without a metric, and if no checkpoint has a finite value of it."""
        if not self.best:
            return None
        values = [(self._value(self._manager.metrics(step) or {}), step) for step in self.steps()]
        value, step = max(values, default=(_WORST, None))
        return None if value == _WORST else step

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Starts to save `state`, a pytree of arrays, as the checkpoint of `step`; returns before it is on disk.

        The caller may donate the state's buffers at once. Raises UserError if this save, or the one before it, cannot
        be written. A step that has a checkpoint is not saved again.
        """
        if step in self._manager.all_steps():
            return
        self.wait()  # for the save before this one
        self._attempt(self._manager.save, step, args=ocp.args.StandardSave(state), metrics=dict(metrics or {}))

    def wait(self) -> None:
        """Returns when every save is on disk. Raises UserError if one failed."""
        self._attempt(self._manager.wait_until_finished)
        self._attempt(self._write_manifests)

    def poll(self) -> None:
        """Finishes a save whose arrays are on disk. Does not wait for one that is still being written."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        """Waits for every save and closes Orbax's manager."""
        self.wait()
        self._manager.close()

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at `step`; `like` is a pytree of `jax.ShapeDtypeStruct` with shardings.

        The shardings may be over another number of devices than the state was saved from. Raises UserError for a
        damaged checkpoint, and for a checkpoint of another model.
        """
        folder = self.directory / str(step)
        if fault := _find_fault(folder):
            raise UserError(f"checkpoint {folder} is damaged: {fault}")
        try:
            if clash := _find_clash(self._manager.item_metadata(step), like):
                raise UserError(f"checkpoint {folder} is of another model or optimizer: {clash}")
            return self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except UserError:
            raise
        except Exception as e:  # Orbax and TensorStore raise many types, for damage and for other shapes alike
            raise UserError(f"checkpoint {folder} cannot be read: {reason(e)}") from e

    def restore_any(self, step: int, sharding: jax.sharding.Sharding) -> Any:
        """What was saved at `step`, of any model: nested dicts of arrays with this sharding."""
        folder = self.directory / str(step)
        try:
            saved = self._manager.item_metadata(step)
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved)
        except Exception as e:  # of many types, as in `restore`
            raise UserError(f"checkpoint {folder} cannot be read: {reason(e)}") from e
        return self.restore(step, like)

    def restore_latest(self, like: Any) -> tuple[int, Any] | None:
        """(step, state) of the latest checkpoint that can be read; None if there is no checkpoint at all.

        A damaged checkpoint is reported and, unless this object is read-only, moved to `damaged/` beside the
        checkpoints. Raises UserError if there are checkpoints and none can be read: most likely they are of another
        model.
        """
        steps = self.steps()
        errors = []
        for step in reversed(steps):
            try:
                state = self.restore(step, like)
            except UserError as e:
                errors.append((step, e))
                continue
            for bad_step, error in errors:
                self._set_aside(bad_step, error, step)
            return step, state
        if errors:
            fix = "" if self._read_only else "; remove or rename that directory to train from the start"
            raise UserError(f"no checkpoint of {steps} in {self.directory} can be read: {errors[0][1]}{fix}")
        return None

    def _write_manifests(self) -> None:
        """Writes the manifest of each new checkpoint: size and checksum of every file."""
        for folder in [self.directory / str(step) for step in self._manager.all_steps()]:
            if not self._read_only and not (folder / _MANIFEST).exists():
                temporary = folder / f"{_MANIFEST}.tmp"
                temporary.unlink(missing_ok=True)  # an earlier process may have been killed while it wrote this file
                files = {str(f.relative_to(folder)): _measure(f) for f in sorted(folder.rglob("*")) if f.is_file()}
                temporary.write_text(json.dumps(files))
                temporary.rename(folder / _MANIFEST)

    def _set_aside(self, step: int, error: UserError, used: int) -> None:
        if self._read_only:
            log.warning("%s; the checkpoint of step %d is used", error, used)
            return
        target = self.directory.parent / "damaged" / str(step)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        (self.directory / str(step)).rename(target)
        self._manager.reload()
        log.warning("%s; it was moved to %s and the checkpoint of step %d is used", error, target, used)

    def _attempt(self, function: Any, *args: Any, **kwargs: Any) -> None:
        try:
            functools.partial(function, *args, **kwargs)()
        except Exception as e:  # a full or failing disk surfaces as OSError, ValueError or a TensorStore status
            good = [s for s in self._manager.all_steps() if (self.directory / str(s)).is_dir()]
            kept = f"the last good one is of step {max(good)}" if good else "there is none before it"
            raise UserError(
                f"a checkpoint could not be saved in {self.directory}: {reason(e)}; {kept}; free some space or repair "
                "the disk, then run the same command again"
            ) from e


def _find_clash(saved: Any, like: Any) -> str:
    """The first array whose dtype or shape differs; "" if there is none, or if the metadata `saved` is missing."""
    if saved is None:
        return ""
    has, wants = ({name: _describe(x) for name, x in tree.named_leaves(t)} for t in (saved, like))
    names = sorted({**has, **wants}, key=lambda name: ("/opt_state/" in name, name))  # a parameter explains most
    clashes = (name for name in names if has.get(name) != wants.get(name))
    return next((f"{n} is {has.get(n, 'absent')} in it, {wants.get(n, 'absent')} by the config" for n in clashes), "")


def _describe(array: Any) -> str:
    """Its dtype and shape as they are saved: Orbax saves random keys as the words of their data."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.eval_shape(jax.random.key_data, array)
    return f"{np.dtype(array.dtype)}{list(array.shape)}"


def _measure(file: Path) -> list[int]:
    content = file.read_bytes()
    return [len(content), zlib.crc32(content)]


def _find_fault(folder: Path) -> str:
    """What is wrong with a checkpoint's files; "" if nothing is, or if there is no manifest to compare them with."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())
    except FileNotFoundError:
        return ""
    except ValueError:
        return f"{_MANIFEST} is not JSON"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"the file {name} is missing"
        found = _measure(folder / name)
        if found != expected:
            what = f"has {found[0]} bytes, not {expected[0]}" if found[0] != expected[0] else "has changed"
            return f"the file {name} {what}"
    return ""

"""Checkpoints. Orbax saves them asynchronously and renames them atomically; this module verifies them.

A checkpoint holds the train state and the metric accumulator since the last log line, so a resumed run logs the same
numbers as an uninterrupted one. To `ocp.CheckpointManager` it adds (tests/run/test_checkpoint.py):
checksums of all files, since Orbax restores flipped bits; falling back to an older checkpoint; and removing old
checkpoints only once the new one is verified. Which one is best follows from metrics.jsonl.
"""

import concurrent.futures
import contextlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from imgclf_jax.core import internals, paths, processes, tree
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.typing import Array, PyTree
from imgclf_jax.run import manifest, writers
from imgclf_jax.run.ranking import find_best, parse_best, values_of
from imgclf_jax.run.workdir import check_path

log = logging.getLogger(__name__)
# Orbax warns of each directory that it is asked to open as `read_only`.
logging.getLogger("absl").addFilter(lambda record: "directory is read only" not in str(record.msg))

_OPTIMIZER = "state/opt_state/"  # how the names of the optimizer's arrays begin
_REMOVED = "removed-"  # a checkpoint while its files are removed

_COMMIT_FILE = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)

# One device writes a replicated array. By default each device writes a slice, and Orbax compiles a program for each of
# them: 240 programs, 26 s, for 60 arrays on four devices.
_types = ocp.type_handlers
_HANDLERS = _types.create_type_handler_registry(
    *((kind, _types.get_type_handler(kind)) for kind in _types.supported_types() if kind is not jax.Array),
    (jax.Array, _types.ArrayHandler(use_replica_parallel=False)),
)


class CheckpointRemoved(UserError):
    """The run removed a checkpoint while it was being read."""


type Leaf = Any  # an array or a jax.ShapeDtypeStruct


class Checkpoints:
    """The checkpoints in `directory`: the latest `keep`, and the best by the metric `best` (see `ranking.parse_best`).

    The values of the metric are those in metrics.jsonl, next to `directory`.
    """

    def __init__(self, directory: Path, keep: int = 2, best: str = "", read_only: bool = False):
        parent = directory.parent if paths.in_bucket(directory) else directory.parent.resolve()
        self.directory = parent / directory.name
        check_path(self.directory)
        self.best, self._sign = parse_best(best) if best else ("", 1.0)
        self._read_only = read_only
        paths.check_plain(self.directory)  # Orbax opens and removes files by their names
        if not read_only:
            processes.broadcast(self._prepare)
        self._keep = keep
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.LatestN(None),  # all: Orbax would remove some before the new one is verified
            cleanup_tmp_directories=not read_only,
            create=False,
            # By default Orbax waits in a device collective, which needs as many devices in every process.
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=set(range(processes.count()))),
            async_options=ocp.AsyncOptions(barrier_sync_fn=_wait_unless_failed),
            save_interval_steps=0 if read_only else 1,
            read_only=read_only,
            # A folder in a bucket cannot be renamed atomically, so a file marks it as complete.
            atomicity_options=_COMMIT_FILE if paths.in_bucket(self.directory) else None,
        )
        if str(self.directory).startswith("s3://"):
            internals.teach_orbax_s3()
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=_HANDLERS)
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handler)
        except (ValueError, TypeError, KeyError) as e:  # from a _CHECKPOINT_METADATA with other values
            raise UserError(f"a checkpoint in {self.directory} has damaged metadata: {reason(e)}; remove it") from e
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None
        self.latest = max(self.steps(), default=0)  # the step of the latest verified checkpoint

    def _prepare(self) -> None:
        paths.make_folder(self.directory)
        for left in self.directory.glob(f"{_REMOVED}*"):
            paths.remove(left)

    def steps(self) -> list[int]:
        """The steps with a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of the best checkpoint, the first one of equals; None without a finite value of the metric."""
        if not self.best:
            return None
        values = values_of(writers.read_metrics(self.directory.parent / "metrics.jsonl"), self.best)
        steps = self.steps()
        found = find_best(((step, value) for step, value in values if step in steps), self._sign)
        return found and found[0]

    def save(self, step: int, state: PyTree) -> None:
        """Starts saving `state`, a pytree of arrays, as the checkpoint of `step`; returns before it is on disk.

        The caller may donate the state's buffers right away, and has flushed metrics.jsonl. Does nothing if the step
        has a checkpoint. Raises UserError if this save or the previous one fails.
        """
        saving = self._saving
        self.wait()
        if saving:
            processes.barrier()  # until process 0 has verified the previous save
        if step in self._manager.all_steps():
            return
        self._attempt(lambda: self._manager.save(step, args=ocp.args.PyTreeSave(state)))
        self._saving = self._thread.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        """Waits, in the thread, until a checkpoint is on disk; writes its manifest, and removes those it replaces."""
        self._manager.wait_until_finished()
        if processes.index():
            self.latest = step
            return
        manifest.write(self.directory / str(step))
        self.latest = step
        steps = self.steps()
        kept = {*steps[-self._keep :], self.best_step()}
        if old := [one for one in steps if one not in kept]:
            for one in old:
                self._remove(one)
            self._manager.reload()

    def _remove(self, step: int) -> None:
        """Removes a checkpoint. On a disk it is no step from the first moment on, for readers and after a kill."""
        folder, aside = self.directory / str(step), self.directory / f"{_REMOVED}{step}"
        if paths.in_bucket(folder):
            paths.remove(folder)
            return
        with contextlib.suppress(OSError):  # it is gone, or the disk is read-only
            paths.move(folder, aside)
        paths.remove(aside)

    def wait(self) -> None:
        """Waits until every save of this process is on disk, in process 0 also verified. Raises UserError if not."""
        saving, self._saving = self._saving, None
        if saving:
            self._attempt(saving.result)

    def poll(self) -> None:
        """Raises UserError if the last save has failed, without waiting for it."""
        if self._saving and self._saving.done() and self._saving.exception():
            self.wait()

    def describe_latest(self) -> str:
        """Waits for the saves of this process, and says where a run that ends now continues."""
        self.wait()
        return f"the checkpoint of step {self.latest}" if self.latest else "the beginning"

    def close(self) -> None:
        """Waits for every save and closes Orbax's manager."""
        self.wait()
        self._thread.shutdown()
        self._manager.close()

    def restore(self, step: int, like: PyTree = None, optimizer: bool = True) -> PyTree:
        """Restores the state of `step`; `like` is a pytree of `jax.ShapeDtypeStruct` with shardings.

        The number of devices may differ from when it was saved. Without `optimizer`, the optimizer's state is not read
        and is None in the result; top-level entries that `like` lacks are not read either. Without `like`, the state
        of any model is read, as nested dicts of NumPy arrays. Raises UserError for a damaged checkpoint and for
        another model's.
        """
        folder = self.directory / str(step)
        if error := processes.broadcast(lambda: self._find_error(step, like, optimizer)):
            raise self._gone(folder) or UserError(error)
        processes.agree(lambda: {f"checkpoint {folder}": manifest.digest(folder)},
                        fix="all processes must read one work directory, on a shared disk")  # fmt: skip
        try:
            return self._read(step, like, optimizer)
        except Exception as e:  # Orbax and TensorStore raise many types, for damage and for other shapes
            if processes.count() > 1:
                raise  # other processes may have read it, so all must end
            raise self._gone(folder) or UserError(f"checkpoint {folder} cannot be read: {reason(e)}") from e

    def _read(self, step: int, like: PyTree, optimizer: bool) -> PyTree:
        """Reads the state, with NumPy arrays where `like` has no shardings."""
        if like is None:
            saved = self._manager.item_metadata(step)
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)

        def restore_args(x: Any) -> Any:
            if x is ocp.PLACEHOLDER or x.sharding is None:
                return ocp.RestoreArgs(restore_type=np.ndarray)
            return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)

        skipped = () if optimizer else (_OPTIMIZER,)
        wanted = tree.map_named(lambda name, x: ocp.PLACEHOLDER if name.startswith(skipped) else x, like)
        arguments = ocp.args.PyTreeRestore(wanted, jax.tree.map(restore_args, wanted), partial_restore=not optimizer)
        found = self._manager.restore(step, args=arguments)
        if optimizer:
            return jax.tree.map(_wrap_key, found, like)
        state = found["state"]  # a TrainState, or a dict of its fields
        state = {**state, "opt_state": None} if isinstance(state, dict) else state.replace(opt_state=None)
        return {**found, "state": state}

    def _find_error(self, step: int, like: PyTree, optimizer: bool) -> str:
        """A sentence on why the checkpoint of `step` cannot be used; "" if it can."""
        folder = self.directory / str(step)
        fault = manifest.find_fault(folder)
        if fault == manifest.ABSENT and folder.is_dir():
            log.warning("checkpoint %s is used without verification: %s", folder, fault)
        elif fault:
            return f"checkpoint {folder} is damaged: {fault}"
        try:
            saved = self._manager.item_metadata(step)
            if saved is None or like is None:
                return ""
            if not optimizer:
                saved = {name: part for name, part in dict(saved).items() if name in like}
            clash = _find_clash(saved, like)
        except Exception as e:  # of many types
            return f"checkpoint {folder} cannot be read: {reason(e)}"
        return f"checkpoint {folder} is of another model or optimizer: {clash}" if clash else ""

    def _gone(self, folder: Path) -> CheckpointRemoved | None:
        if self._read_only and not folder.is_dir():
            return CheckpointRemoved(f"checkpoint {folder} was removed while it was read, since its run still trains; "
                                     "run this again")  # fmt: skip
        return None

    def restore_latest(self, like: PyTree, optimizer: bool = True) -> tuple[int, PyTree] | None:
        """Restores the latest checkpoint that can be read: (step, state); None if there is no checkpoint.

        See `restore` for the state. A checkpoint that is damaged, or that lacks a manifest while an older one has it,
        is reported and, unless this object is read-only, moved to `damaged/` next to the checkpoints. Raises UserError
        if there are checkpoints but none can be read, most likely since they are another model's.
        """
        steps = processes.broadcast(self.steps)
        files = [self.directory / str(step) / manifest.NAME for step in steps]
        sealed = processes.broadcast(lambda: [step for step, file in zip(steps, files, strict=True) if file.exists()])
        errors: dict[int, UserError] = {}
        for step in sorted(steps, key=lambda step: (step in sealed, step), reverse=True):
            try:
                state = self.restore(step, like, optimizer)
            except (CheckpointRemoved, processes.ProcessMismatch):
                raise
            except UserError as e:
                errors[step] = e
                continue
            for later in (s for s in steps if s > step):
                unverified = f"checkpoint {self.directory / str(later)} cannot be verified: {manifest.ABSENT}"
                self._set_aside(later, errors.get(later) or unverified, step)
            return step, state
        if errors:
            fix = "" if self._read_only else "; remove or rename that directory to train from the start"
            raise UserError(f"no checkpoint of {steps} in {self.directory} can be read: {errors[steps[-1]]}{fix}")
        return None

    def _set_aside(self, step: int, error: UserError | str, used: int) -> None:
        if self._read_only:
            log.warning("%s; the checkpoint of step %d is used", error, used)
            return
        target = self.directory.parent / "damaged" / str(step)

        def move() -> None:
            paths.make_folder(target.parent)
            paths.remove(target)
            paths.move(self.directory / str(step), target)

        processes.broadcast(move)
        self._manager.reload()
        log.warning("%s; it was moved to %s and the checkpoint of step %d is used", error, target, used)

    def _attempt(self, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception as e:  # a full or failing disk surfaces as OSError, ValueError or a TensorStore status
            kept = f"the last good one is from step {self.latest}" if self.latest else "there is none before it"
            raise UserError(f"a checkpoint could not be saved in {self.directory}: {reason(e)}; {kept}; free some "
                            "space or repair the disk, then run the same command again") from e  # fmt: skip


def _wait_unless_failed(key: str, timeout_ms: int) -> None:
    """Waits for all processes, except while a save fails here: the others then wait in another barrier of Orbax."""
    if not sys.exception():
        ocp.multihost.get_barrier_sync_fn(processes=set(range(processes.count())))(key=key, timeout_ms=timeout_ms)


def _is_key(leaf: Leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _wrap_key(data: Array, like: Leaf) -> Array:
    if not _is_key(like):
        return data
    impl: list[Any] = []
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(data, impl=impl[0])


def _find_clash(saved: PyTree, like: PyTree) -> str:
    """The first array whose dtype or shape differs; "" if there is none."""
    has, wants = ({name: _describe(x) for name, x in tree.named_leaves(t)} for t in (saved, like))
    names = sorted({**has, **wants}, key=lambda name: ("/opt_state/" in name, name))  # parameters explain most
    clashes = (name for name in names if has.get(name) != wants.get(name))
    return next((f"{n} is {has.get(n, 'absent')} in it, {wants.get(n, 'absent')} by the config" for n in clashes), "")


def _describe(leaf: Leaf) -> str:
    """The dtype and shape that a leaf has in a checkpoint: Orbax stores random keys as their uint32 data."""
    stored = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return f"{np.dtype(stored.dtype)}{list(stored.shape)}"

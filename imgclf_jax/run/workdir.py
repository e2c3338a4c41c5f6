"""The work directory: the names of its files, and the checks before a command uses it."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core import json_files, paths, processes, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import JsonMapping, JsonObject
from imgclf_jax.data.source import DataInfo
from imgclf_jax.run import lock
from imgclf_jax.run.provenance import data_info, find_differences, module_digests, snapshots

log = logging.getLogger(__name__)

_NAMED = 4  # most differences in a message
_FOLDERS = {"checkpoints", "damaged", "profile", "tb"}  # of a run
_SEEN = 10.0  # seconds until all hosts see a new file on a shared disk


def check_path(path: Path) -> None:
    """Raises UserError unless checkpoints can be in `path`.

    Orbax takes some characters of it for patterns, and TensorStore refuses a backslash and what is not UTF-8.
    """
    text = str(path if paths.in_bucket(path) else path.resolve())
    if set("*?[\\") & set(text) or text.encode(errors="ignore").decode() != text:
        raise UserError(f"the path of the work directory {text!r} has one of *, ?, [ and \\, or is not UTF-8, and no "
                        "checkpoint can be saved there; pass another --workdir")  # fmt: skip


class Workdir:
    """The files of one run under `path`."""

    def __init__(self, path: Path | str):
        self.path = path = paths.as_path(path) if isinstance(path, str) else path
        self.config = path / "config.json"
        self.provenance = path / "provenance.json"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.digests = path / "digests.jsonl"
        self.result = path / "result.json"
        self.calibration = path / "calibration.json"

    def load_config(self) -> ConfigDict:
        """Loads the config that the run was trained with. Raises UserError if this directory has no run."""
        if not self.config.is_file():
            raise UserError(f"{self.path} holds no run: there is no {self.config}; train first, or "
                            "pass the run's --workdir")  # fmt: skip
        content = paths.read(self.config)
        return configs.from_json(content, str(self.config))

    def read_snapshots(self) -> list[JsonObject]:
        """The snapshots in provenance.json; [] without the file. Raises UserError if it is not JSON."""
        return snapshots(json_files.read(self.provenance) if self.provenance.is_file() else {})

    def load_data_info(self) -> DataInfo:
        """Loads the facts about the data from provenance.json. Raises UserError if it is missing or damaged."""
        try:
            return data_info(json_files.read(self.provenance)["data"])
        except (UserError, KeyError, TypeError, ValueError, AttributeError) as e:
            what = "is damaged; remove it" if self.provenance.is_file() else "is missing"
            raise UserError(f"{self.provenance} {what}, and run train again with the config and work directory of "
                            "this run, which writes it anew from the data") from e  # fmt: skip

    def untrusted(self) -> contextlib.AbstractContextManager[None]:
        """Inside, refuses imports and downloads that the run names, since anybody may have written it."""
        return spec.untrusted(f"the run in {self.path}")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Creates the directory if it is missing, and holds its lock inside, so that one run at a time trains in it.

        Raises UserError if another run holds it or the directory cannot be written. Warns of a bucket, without locks.
        """
        if paths.in_bucket(self.path):
            log.warning("%s is in a bucket, which cannot be locked: start no second run in it while this one trains",
                        self.path)  # fmt: skip
            yield
            return
        check_path(self.path)
        with lock.held(self.path / "lock"):
            yield

    def refuse_data(self) -> None:
        """Raises UserError if the directory holds folders but no run, as a data set does."""
        if self.path.is_dir() and not self.config.is_file():
            folders = {entry.name for entry in self.path.iterdir() if entry.is_dir()} - _FOLDERS
            if folders:
                raise UserError(f"work directory {self.path} holds the folder {min(folders)!r} and no run; pass "
                                "another --workdir")  # fmt: skip

    def check_shared(self) -> None:
        """Raises UserError in all processes unless each sees the lock of process 0 in its work directory.

        The same path may be on another disk on another host. For a bucket, only the names are compared.
        """
        bucket, file = paths.in_bucket(self.path), self.path / "lock"

        def identify() -> str:
            with contextlib.suppress(OSError):  # it is not seen yet
                return str(self.path) if bucket else paths.read(file).decode(errors="replace")
            return ""

        end, theirs = time.monotonic() + _SEEN, processes.broadcast(identify)
        while identify() != theirs and not bucket and time.monotonic() < end:
            time.sleep(0.1)
        processes.agree(lambda: {"the lock in the work directory": identify()},
                        "give all processes one --workdir on a disk that the hosts share")  # fmt: skip

    def last_checkpoint(self) -> int | None:
        """The step of the last checkpoint, readable or not; None without one."""
        folders = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return max((int(folder.name) for folder in folders if folder.name.isdecimal()), default=None)

    def write_parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Lists every parameter by path with its shape in parameters.txt: `rules` match these paths. Needs CLU."""
        with contextlib.suppress(ImportError):
            from clu import parameter_overview

            params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
            overview = parameter_overview.get_parameter_overview(params, include_stats=False)
            paths.write_atomically(self.path / "parameters.txt", f"{overview}\n")

    def changed_modules(self) -> list[str]:
        """The files of the user's imported modules that have changed since the run's last step."""
        last = self.read_snapshots()[-1:]
        return [one.what.removeprefix("modules.") for snapshot in last
                for one in find_differences(snapshot, {"modules": module_digests()})]  # fmt: skip

    def warn_of_changed_modules(self) -> None:
        """Warns about the user's own modules that have changed since the run's last step."""
        for name in self.changed_modules():
            log.warning("%s has changed since the run in %s was trained: its outputs may differ", name, self.path)

    def drop_result(self, start: int) -> None:
        """Removes result.json, since the run trains on from step `start`."""
        if last := self.last_step():
            log.warning("the run resumes at step %d: removed %s, which was from step %d", start, self.result, last)
            self.result.unlink()

    def is_done(self) -> bool:
        """Whether the run has ended, with all its records; a run that trains on has no result."""
        return self.config.is_file() and self.provenance.is_file() and self.last_step() > 0

    def last_step(self) -> int:
        """The step of result.json, at which the run ended; 0 without one that is readable."""
        with contextlib.suppress(UserError):
            step = json_files.read(self.result).get("step")
            return step if type(step) is int else 0
        return 0

    def check_snapshot(self, snapshot: JsonMapping) -> None:
        """Raises UserError if the run in the directory began with other data or weights than those of `snapshot`."""
        for last in self._begun()[-1:]:
            if found := [one for one in find_differences(last, snapshot) if one.kind in ("data", "weights")]:
                named = "; ".join(map(str, found[:_NAMED]))
                raise UserError(f"{self.path} holds a run on other data or weights: {named}; restore them, or pass "
                                "another --workdir")  # fmt: skip

    def record(self, config: str, snapshot: JsonMapping, start: int) -> None:
        """Appends the snapshot of the process that trains from step `start` on to provenance.json; writes config.json.

        `config` is JSON. Snapshots of a later step go, since nothing is left of those processes. Logs differences.
        """
        kept = [one for one in self._begun() if one.get("step", 0) < start]
        if kept and (found := find_differences(kept[-1], snapshot)):
            more = f", and {len(found) - _NAMED} more" * (len(found) > _NAMED)
            log.warning("changed since the run began, in effect from step %d on: %s%s", start,
                        "; ".join(map(str, found[:_NAMED])), more)  # fmt: skip
        weights = {"init_from": kept[0]["init_from"]} if kept and "init_from" in kept[0] else {}
        first, *later = *kept, {**weights, **snapshot, "step": start}
        json_files.write(self.provenance, {**first, "resumed": later})
        paths.write_atomically(self.config, config)

    def _begun(self) -> list[JsonObject]:
        """The snapshots of a run that has begun: a kill may leave the file alone. Raises UserError if it is damaged."""
        if not (self.provenance.is_file() and (self.config.is_file() or self.last_checkpoint() is not None)):
            return []
        self.load_data_info()  # which every command on the run needs
        return self.read_snapshots()

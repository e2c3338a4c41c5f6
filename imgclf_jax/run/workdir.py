"""The work directory: the names of its files, and the checks before a command uses it."""

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Self

import jax
from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core import json_files, places, processes, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import JsonMapping, JsonObject
from imgclf_jax.run import lock, writers
from imgclf_jax.run.provenance import (
    DataInfo,
    collect,
    find_changes,
    load_data_info,
    pin_groups,
    well_formed,
    with_changed_code,
)

log = logging.getLogger(__name__)

_SEEN = 10.0  # seconds until all hosts see a new file on a shared disk


def check_path(path: Path) -> None:
    """Raises UserError unless checkpoints can be in `path`.

    Orbax takes some characters of it for patterns, and TensorStore refuses a backslash and what is not UTF-8.
    """
    text = str(path if places.in_bucket(path) else path.resolve())
    if set("*?[\\") & set(text) or text.encode(errors="ignore").decode() != text:
        raise UserError(f"the path of the work directory {text!r} has one of *, ?, [ and \\, or is not UTF-8, and no "
                        "checkpoint can be saved there; pass another --workdir")  # fmt: skip


class Workdir:
    """The files of one run under `path`."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.provenance = path / "provenance.json"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.digests = path / "digests.jsonl"
        self.result = path / "result.json"

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The work directory at a path or address: see `places.as_path`."""
        return cls(places.as_path(text))

    def load_config(self) -> ConfigDict:
        """Loads the config that the run was trained with. Raises UserError if this directory has no run."""
        if not self.config.is_file():
            raise UserError(f"{self.path} holds no run: there is no {places.absolute(self.config)}; train first, or "
                            "pass the run's --workdir")  # fmt: skip
        content = places.read(self.config)
        return configs.from_json(content, str(self.config))

    def read_provenance(self) -> JsonObject:
        """The content of provenance.json, see `well_formed`; {} without one. Raises UserError if it is not JSON."""
        found = json_files.read(self.provenance) if self.provenance.is_file() else {}
        return well_formed(json_files.as_object(found))

    def read_result(self) -> JsonObject:
        """The content of result.json; {} if the run has not ended, or if the file is damaged."""
        with contextlib.suppress(UserError):
            return json_files.as_object(json_files.read(self.result))
        return {}

    def load_data_info(self) -> DataInfo:
        """Loads the facts about the data from provenance.json. Raises UserError if it is missing or damaged."""
        return load_data_info(self.provenance)

    def total_steps(self, config: ConfigDict) -> int:
        """The number of steps by a config, on the recorded data. Raises UserError if the run has recorded none."""
        examples = self.load_data_info().train_examples
        return configs.steps(config.total, "total", examples, config.batch_size)

    def untrusted(self, argv: Sequence[str] = ()) -> contextlib.AbstractContextManager[None]:
        """Inside, refuses imports and downloads that the run names, since anybody may have written it.

        `argv` are the words of the command line, which are trusted: see `spec.untrusted`.
        """
        return spec.untrusted(f"the run in {self.path}", argv)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Creates the directory if it is missing, and holds its lock inside, so that one run at a time trains in it.

        A directory that it created is removed again if it is empty at the end. Raises UserError if another run holds
        the lock or the directory cannot be written. Logs a warning for a bucket, which has no locks.
        """
        if places.in_bucket(self.path):
            log.warning("%s is in a bucket, which cannot be locked: start no second run in it while this one trains",
                        self.path)  # fmt: skip
            yield
            return
        check_path(self.path)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock.held(self.path / "lock"))
            except OSError as e:
                reason = "it is a file" if self.path.is_file() else e.strerror
                raise UserError(
                    f"work directory {self.path} cannot be written: {reason}; pass another --workdir"
                ) from e
            yield

    def check_shared(self) -> None:
        """Raises UserError in all processes unless each sees the lock of process 0 in its work directory.

        The same path may be on another disk on another host. For a bucket, only the names are compared.
        """
        bucket, file = places.in_bucket(self.path), self.path / "lock"

        def identify() -> str:
            return str(self.path) if bucket else lock.holder(file)

        end, theirs = time.monotonic() + _SEEN, processes.broadcast(identify)
        while identify() != theirs and not bucket and time.monotonic() < end:
            time.sleep(0.1)
        processes.agree(lambda: {"the lock in the work directory": identify()},
                        "give all processes one --workdir on a disk that the hosts share")  # fmt: skip

    def has_checkpoints(self) -> bool:
        """Whether the directory has any checkpoint, readable or not."""
        return self.last_checkpoint() is not None

    def last_checkpoint(self) -> int | None:
        """The step of the last checkpoint, readable or not; None without one."""
        folders = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return max((int(folder.name) for folder in folders if folder.name.isdecimal()), default=None)

    def check_config(self, config: ConfigDict, may_differ: Sequence[str] = ()) -> str:
        """Raises UserError, naming the keys that differ, if the directory holds a run with another config.

        Returns the config of that run as JSON if it differs only in the keys `may_differ` and `configs.free_keys`, and
        "" if it does not differ.
        """
        if not self.config.is_file():
            if self.has_checkpoints():
                log.warning("%s is missing: assuming that the run was trained with the present config", self.config)
            return ""
        old = self.load_config()
        lines = configs.difference(old, config, (*may_differ, *configs.free_keys(config)))
        if not lines:
            return configs.to_json(old) if configs.difference(old, config) else ""
        hint = ""
        if [line.partition(":")[0] for line in lines] == ["total"]:
            hint = " add --extend to train this run up to the new total, if its schedule allows it,"
        raise UserError(f"{self.path} holds a run with another config ({'; '.join(lines)}); use the old values,{hint} "
                        "or pass another --workdir")  # fmt: skip

    def update_config(self, config: ConfigDict, start: int) -> None:
        """Records that the run continues from step `start` with another `total`, or other values of FREE_KEYS.

        This is in effect once config.json is replaced. A process that is killed before leaves an entry in
        provenance.json, which the same command does not repeat.
        """
        old, provenance = self.load_config(), json_files.read(self.provenance)
        if old.total != config.total:
            entry: JsonObject = {"step": start, "from": old.total, "to": config.total, "command": sys.argv}
            _note(provenance, "extended", entry)
            log.warning("the run goes on with total=%r instead of %r, as config.json now says: the steps from %d on "
                        "are those of a run with this total", config.total, old.total, start)  # fmt: skip
        a, b = configs.flatten(old), configs.flatten(config)
        if keys := {key: [a[key], b[key]] for key in configs.FREE_KEYS if a[key] != b[key]}:
            entry = {"step": start, "keys": keys, "command": sys.argv}
            _note(provenance, "changed", entry)
            log.info("from step %d on the run has other keys, which change no bit: %s; config.json has them now",
                     start, ", ".join(f"{key}={new!r}" for key, (_, new) in keys.items()))  # fmt: skip
        if config.checkpoint.best and "checkpoint.best" in keys:
            log.warning("checkpoint.best=%r chooses among the checkpoints that are left and later ones: some that were "
                        "better by it may have been removed", config.checkpoint.best)  # fmt: skip
        json_files.write(self.provenance, provenance)
        places.write_atomically(self.config, configs.to_json(config))

    def write_parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Lists every parameter by path with its shape in parameters.txt: `rules` match these paths. Needs CLU."""
        with contextlib.suppress(ImportError):
            from clu import parameter_overview

            params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
            overview = parameter_overview.get_parameter_overview(params, include_stats=False)
            places.write_atomically(self.path / "parameters.txt", f"{overview}\n")

    def record_code(self, start: int) -> None:
        """Records the code and environment in which the run continues from step `start`, and warns of changes."""
        recorded = json_files.read(self.provenance)
        changes = find_changes(recorded)
        names = [name if name != "imgclf_jax" else "the code of imgclf_jax" for name in changes["files"]]
        names += [f"{name} (now {value})" for name, value in changes["environment"].items()]
        if (now := with_changed_code(recorded, start)) != recorded:
            json_files.write(self.provenance, now)
        if names and start:
            log.warning("changed since the run began, in effect from step %d on: %s", start, ", ".join(names))

    def changed_modules(self) -> list[str]:
        """The files of the user's imported modules that have changed since the run's last step."""
        return [name for name in find_changes(self.read_provenance())["files"] if name != "imgclf_jax"]

    def warn_of_changed_modules(self) -> None:
        """Warns, once each, about the user's own modules that have changed since the run's last step."""
        for name in self.changed_modules():
            _warn_once(f"{name} has changed since the run in {self.path} was trained: its outputs may differ")

    def write_result(self, result: JsonObject) -> None:
        """Writes result.json: the run has ended."""
        json_files.write(self.result, result)

    def pin_groups(self, config: ConfigDict) -> ConfigDict:
        """The config that the run continues with, whose BatchNorm statistics keep the groups that it began with."""
        if not self.provenance.is_file():
            return config
        mesh = self.load_config().mesh if self.config.is_file() else config.mesh
        return pin_groups(config, mesh, self.read_provenance())

    def drop_later_result(self, start: int) -> None:
        """Removes result.json if it is from step `start`, from which the run trains on, or from a later one."""
        if (last := self.last_step()) >= max(start, 1):
            log.warning("the run resumes at step %d: removed %s, which was from step %d", start, self.result, last)
            self.result.unlink()

    def is_done(self, total: int) -> bool:
        """Whether the run has ended: result.json is readable, and `has_ended` by it and the records."""
        records = (line for file in (self.metrics, self.digests) for line in writers.read_metrics(file))
        return has_ended(self.read_result(), total, records)

    def last_step(self) -> int:
        """The step of result.json, at which the run ended; 0 without one that is readable."""
        step = self.read_result().get("step")
        return step if type(step) is int else 0

    def record(
        self, config: ConfigDict, data: DataInfo, init_from: JsonObject | None = None, left_out: Sequence[str] = (),
        evals: Mapping[str, str] = MappingProxyType({}), groups: int = 0, fixed: str = "",
    ) -> None:  # fmt: skip
        """Writes config.json and provenance.json, each once: they describe the process that began the run.

        - `init_from` describes the weights that a new run starts from; None for random weights or a resumed run.
        - `left_out` are the unreadable files that were left out of the data.
        - `evals` are the fingerprints of the evaluation sets, by name.
        - `groups` is the number of groups of BatchNorm statistics with 'per_device', else 0.
        - `fixed` is the digest of the method's fixed arrays.

        Raises UserError if the run in the directory began with other data, weights or fixed arrays, or has done more
        steps than the config's `total`.
        """
        begun = self.has_checkpoints() or self.config.is_file()  # a kill may leave a provenance.json alone
        if known := begun and self.provenance.is_file():
            old = load_data_info(self.provenance)
            if old != data:
                names = [f.name for f in fields(data) if getattr(old, f.name) != getattr(data, f.name)]
                raise UserError(f"the data of the run in {self.path} have changed (another {', '.join(names)}); "
                                "restore them, or pass another --workdir")  # fmt: skip
            recorded = self.read_provenance()
            before = recorded.get("evals", {})
            if names := [name for name in evals if before.get(name, evals[name]) != evals[name]]:
                raise UserError(f"the evaluation set {names[0]} of the run in {self.path} has changed (another "
                                "fingerprint); restore its data, or pass another --workdir")  # fmt: skip
            if init_from and recorded.get("init_from") != init_from:
                raise UserError(f"the weights in {init_from['path']} have changed since the run in {self.path} began; "
                                "restore them, or pass another --workdir")  # fmt: skip
            if (old_fixed := recorded.get("fixed_sha256", "")) != fixed:
                raise UserError(f"method={config.method!r}: its fixed arrays have changed since the run in {self.path} "
                                f"began (digest {fixed[:12] or 'none'}, recorded {old_fixed[:12] or 'none'}); restore "
                                "what it loads, or pass another --workdir")  # fmt: skip
        total = configs.steps(config.total, "total", data.train_examples, config.batch_size)
        if (last := self.last_checkpoint() or 0) > total:
            raise UserError(f"total={config.total!r} is {total} steps, but the run in {self.path} has done {last}; "
                            "pass its own total, extend it to more, or pass another --workdir")  # fmt: skip
        if not known:
            whole = (
                collect(data)
                | {"evals": dict(evals)}
                | ({"batch_norm_groups": groups} if groups else {})
                | ({"init_from": init_from} if init_from else {})
                | ({"fixed_sha256": fixed} if fixed else {})
                | ({"unreadable": {"count": len(left_out), "files": list(left_out)}} if left_out else {})
            )
            json_files.write(self.provenance, whole)
        if not self.config.is_file():
            places.write_atomically(self.config, configs.to_json(config))


def _note(provenance: JsonObject, name: str, entry: JsonObject) -> None:
    """Appends an entry to a list in the provenance, unless it is the last one."""
    entries = provenance.setdefault(name, [])
    if entries[-1:] != [entry]:
        entries.append(entry)


def has_ended(result: JsonMapping, total: int | None, records: Iterable[JsonMapping]) -> bool:
    """Whether a run ended with `result`: at step `total`, if that is known, or early, with no later one of `records`.

    A run that stopped early and is extended may train on beyond its result.
    """
    step = result.get("step")
    if type(step) is not int or total in (None, step):
        return type(step) is int
    return bool(result.get("stopped_early")) and all(record["step"] <= step for record in records)


@functools.cache
def _warn_once(sentence: str) -> None:
    log.warning("%s", sentence)

"""Writes the metrics of a run to metrics.jsonl, to TensorBoard, and to the writers that `config.writers` names."""

import contextlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core import json_files, places, processes, spec
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.typing import JsonMapping, JsonObject
from imgclf_jax.run.event_file import EventFile

log = logging.getLogger(__name__)

TIMES = ("train/images_per_second", "train/input_wait")  # metrics of the run's speed, which differ between runs
_BEGIN = b'{"step": '  # of every line that this package writes


class Writer(Protocol):
    """The interface of a writer, which every `clu.metric_writers.MetricWriter` has.

    A writer that has `write_images(step, {name: [n, h, w, c] or [h, w, c]})` gets the images of `log_images` too.
    """

    def write_hparams(self, hparams: JsonObject) -> None:
        """Takes the config by its dotted keys, once, before anything else."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the metrics of a step, `{"train/loss": …}`; those of training and evaluation come separately."""

    def flush(self) -> None:
        """Persists the metrics so far. A checkpoint is saved next, and a resumed run will not write them again."""

    def close(self) -> None:
        """Closes the writer, also after an error or a signal."""


def _line(record: JsonMapping) -> str:
    return json.dumps(record) + "\n"


class RecordFile:
    """A file of JSON lines to append to. It is first rewritten with the records `kept`.

    In a bucket, whose objects cannot be appended to, `flush` and `close` write the whole file. Raises UserError if the
    file cannot be written.
    """

    def __init__(self, path: Path, kept: Iterable[JsonMapping] = ()):
        content, self._path = "".join(map(_line, kept)), path
        with _naming_errors(path):
            places.write_atomically(path, content)
        self._object = path if places.in_bucket(path) else None
        self._file: IO[str] = io.StringIO() if self._object else places.open_regular(path, "a", "utf-8")
        if self._object:
            self._file.write(content)

    def write(self, record: JsonMapping) -> None:
        """Appends a record and hands it to the operating system, so a killed process does not lose it."""
        with _naming_errors(self._path):
            self._file.write(_line(record))
            self._file.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends the record of metrics of a step."""
        self.write({"step": step, **scalars})

    def flush(self) -> None:
        """Returns when all records are on the disk or in the bucket."""
        with _naming_errors(self._path):
            if isinstance(self._file, io.StringIO) and self._object:
                self._object.write_bytes(self._file.getvalue().encode())
            else:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file. Raises nothing: `write` and `flush` have raised any errors."""
        with contextlib.suppress(Exception):
            if self._object:
                self.flush()
            self._file.close()


class MetricsWriter:
    """Appends records to `metrics.jsonl` in `workdir`, and hands them to the other writers. Only process 0 opens any.

    A record is one line: {"step": 100, "train/loss": …}. A run that resumes at `step` first drops the records after
    this step, and an incomplete last line after a crash; it then writes the same records again. Records that a killed
    process had not flushed to a bucket belong to steps that are repeated. Raises UserError if a file cannot be written
    or a writer cannot be made. A later error in one of `config.writers` ends that writer alone.
    """

    def __init__(self, workdir: Path, step: int, config: ConfigDict):
        self._directory, self._added = workdir, dict[str, Writer]()
        self._own: list[RecordFile | EventFile] = []
        evaluated = False
        if not processes.index():
            try:
                evaluated = self._open(step, config)
            except BaseException:
                self.close()
                raise
        # Whether the evaluation of this step is recorded, known to all processes. Only training records have a pace.
        self.evaluated = processes.broadcast_from_process_0("reading metrics.jsonl", lambda: evaluated)

    def _open(self, step: int, config: ConfigDict) -> bool:
        for name, make in find_factories(config.writers).items():
            self._added[name] = make(self._directory, step)
        path = self._directory / "metrics.jsonl"
        if step and not path.exists():
            log.warning("%s is missing: it will hold no record of the steps before %d", path, step)
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        self._own.append(RecordFile(path, kept))
        with _naming_errors(self._directory / "tb"):
            if config.tensorboard and (events := _open_event_file(self._directory / "tb", step)):
                self._own.append(events)
        hparams = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in configs.flatten(config).items()}
        self._tell("write_hparams", hparams)
        return any(record["step"] == step and "train/images_per_second" not in record for record in kept)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images [n, h, w, c] or [h, w, c] to TensorBoard, and to the writers that have such a method."""
        if images:
            self._tell("write_images", step, images)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one record and hands it to the operating system, so a killed process does not lose it."""
        self._tell("write_scalars", step, scalars)

    def flush(self) -> None:
        """Returns when all records are on disk. Call it before saving a checkpoint, whose records must not be lost."""
        self._tell("flush")

    def close(self) -> None:
        """Closes all writers. Raises nothing: `write_scalars` and `flush` have raised any errors."""
        for file in self._own:
            with contextlib.suppress(Exception):
                file.close()
        self._own.clear()
        self._tell("close")

    def _tell(self, method: str, *args: object) -> None:
        """Calls a method of all writers that have it."""
        with _naming_errors(self._directory / "tb"):
            for file in self._own:
                getattr(file, method, _ignore)(*args)
        for name, writer in list(self._added.items()):
            try:
                getattr(writer, method, _ignore)(*args)
            except Exception as e:  # a failing tracking service must not end a run
                log.warning("writers=%s failed and gets no more metrics: %s: %s", name, type(e).__name__, reason(e))
                del self._added[name]


def _ignore(*_: object) -> None:
    pass


@contextlib.contextmanager
def _naming_errors(path: Path) -> Iterator[None]:
    """Inside, turns an OSError into a UserError that says that `path` could not be written."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path} could not be written: {reason(e)}; free some space or repair the disk, and run the "
                        "same command again") from e  # fmt: skip


def find_factories(text: str) -> dict[str, Callable[[Path, int], Writer]]:
    """The factories of the config's `writers`, by spec: functions (workdir, step) -> Writer.

    The user's function is passed `workdir` and `step` if it has parameters of these names. Raises UserError if it
    cannot be imported or called with the arguments of its spec.
    """

    def bind(call: spec.Call) -> Callable[[Path, int], Writer]:
        made = spec.bind(call, {}, "writer", by_name=("workdir", "step"))
        takes = spec.parameters(made.func, call, "writer").keys() - made.keywords.keys()

        def make(workdir: Path, step: int) -> Writer:
            try:
                writer = made(**{k: v for k, v in (("workdir", workdir), ("step", step)) if k in takes})
            except Exception as e:
                raise UserError(f"writers={str(call)!r} failed to start: {type(e).__name__}: {reason(e)}") from e
            if missing := [name for name in _METHODS if not callable(getattr(writer, name, None))]:
                raise UserError(f"writers={str(call)!r} has no method {missing[0]}; a writer has {', '.join(_METHODS)}")
            return writer

        return make

    return {str(call): bind(call) for call in spec.parse(text)}


_METHODS = ("write_hparams", "write_scalars", "flush", "close")


def read_metrics(path: Path) -> list[JsonObject]:
    """Reads the records of a `metrics.jsonl`, skipping damaged lines, which a crash may leave; [] without a file."""
    return parse_records(places.read(path), str(path)) if path.is_file() else []


def parse_records(content: bytes, where: str, strict: bool = False) -> list[JsonObject]:
    """Parses the records, each with its `step`, in the content of the file `where`; skips damaged lines.

    If `strict`, raises UserError for damage that no crash leaves: a crash truncates only the last line.
    """
    records, damaged, torn = [], 0, False
    for line in io.BytesIO(content):
        record = None
        if not line.isspace():
            with contextlib.suppress(ValueError, RecursionError):
                record = json_files.parse(line.decode("utf-8", "replace"))
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            damaged += 1
            torn = not line.endswith(b"\n") and line[: len(_BEGIN)] == _BEGIN[: len(line)]
    if strict and damaged > torn:
        raise UserError(f"{where} is damaged: {damaged:,} of its {damaged + len(records):,} lines hold no record; "
                        "restore the file from a copy of the run or from its bundle")  # fmt: skip
    if damaged:
        log.warning("%s: skipped %s", where, "a truncated line" if damaged == 1 else f"{damaged:,} damaged lines")
    return records


def _open_event_file(directory: Path, step: int) -> EventFile | None:
    try:
        return EventFile(directory, step)
    except ImportError:
        log.info("TensorBoard is not installed: metrics are written to metrics.jsonl only")
        return None

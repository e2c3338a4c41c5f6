"""Writes the metrics of a run to metrics.jsonl, to TensorBoard, and to the writers that `config.writers` names.

All of them have the interface of `clu.metric_writers.MetricWriter`. CLU's own writer of TensorBoard files is not used:
it imports TensorFlow, which takes half of the memory and of the time of a short run.
"""

import contextlib
import functools
import importlib.util
import inspect
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from imgclf_jax.core import paths, processes, spec
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.typing import JsonMapping, JsonObject
from imgclf_jax.data.resizing import to_pillow, to_uint8

log = logging.getLogger(__name__)

TIMES = ("train/images_per_second", "train/input_wait")  # metrics of the run's speed, which differ between runs


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


class AppendedFile:
    """A file to append to, which first holds `content`.

    In a bucket, whose objects cannot be appended to, `flush` and `close` write the whole file. Raises UserError if the
    file cannot be written.
    """

    def __init__(self, path: Path, content: bytes = b""):
        self._path = path
        with _naming_errors(path):
            paths.write_atomically(path, content)
        self._object = path if paths.in_bucket(path) else None
        self._file: IO[bytes] = io.BytesIO() if self._object else paths.open_regular(path, "ab")
        if self._object:
            self._file.write(content)

    def write(self, content: bytes) -> None:
        """Appends `content` and hands it to the operating system, so a killed process does not lose it."""
        with _naming_errors(self._path):
            self._file.write(content)
            self._file.flush()

    def flush(self) -> None:
        """Returns when all content is on the disk or in the bucket."""
        with _naming_errors(self._path):
            if isinstance(self._file, io.BytesIO) and self._object:
                self._object.write_bytes(self._file.getvalue())
            else:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file. Raises nothing: `write` and `flush` have raised any errors."""
        with contextlib.suppress(Exception):
            if self._object:
                self.flush()
            self._file.close()


def to_line(record: JsonMapping) -> bytes:
    """A record as a line of JSON."""
    return f"{json.dumps(record)}\n".encode()


class MetricsWriter:
    """Appends records to `metrics.jsonl` in `workdir`, and hands them to the other writers. Only process 0 opens any.

    A record is one line: {"step": 100, "train/loss": …}. A run that resumes at `step` first drops the records after
    this step, and an incomplete last line after a crash; it then writes the same records again. Records that a killed
    process had not flushed to a bucket belong to steps that are repeated.

    - `config` has the keys of the run, {"data.source": …}, for the other writers.
    - `specs` names further writers, see `find_factories`; `tensorboard` adds TensorBoard's.

    Raises UserError if metrics.jsonl or a writer cannot be opened. A later error in another writer ends it alone.
    """

    def __init__(self, workdir: Path, step: int, config: JsonMapping, tensorboard: bool = True, specs: str = ""):
        self._writers = dict[str, Writer]()
        self._records: AppendedFile | None = None
        evaluated = False
        if not processes.index():
            self._writers = {name: make() for name, make in find_factories(specs, workdir, step).items()}
            if tensorboard and importlib.util.find_spec("tensorboard"):
                self._writers["TensorBoard"] = TensorBoard(workdir / "tb", step)
            elif tensorboard:
                log.info("tensorboard is not installed: metrics are written to metrics.jsonl alone")
            path = workdir / "metrics.jsonl"
            if step and not path.exists():
                log.warning("%s is missing: it will hold no record of the steps before %d", path, step)
            kept = [record for record in read_metrics(path) if record["step"] <= step]
            self._records = AppendedFile(path, b"".join(map(to_line, kept)))
            self._tell("write_hparams", {k: json.dumps(v) if isinstance(v, dict) else v for k, v in config.items()})
            evaluated = any(record["step"] == step and TIMES[0] not in record for record in kept)
        # Whether the evaluation of this step is recorded, known to all processes. Only training records have a pace.
        self.evaluated = processes.broadcast(lambda: evaluated)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images [n, h, w, c] or [h, w, c] to the writers that have such a method."""
        self._tell("write_images", step, images)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one record and hands it to the operating system, so a killed process does not lose it."""
        if self._records:
            self._records.write(to_line({"step": step, **scalars}))
        self._tell("write_scalars", step, scalars)

    def flush(self) -> None:
        """Returns when all records are on disk. Call it before saving a checkpoint, whose records must not be lost."""
        if self._records:
            self._records.flush()
        self._tell("flush")

    def close(self) -> None:
        """Closes all writers. Raises nothing: `write_scalars` and `flush` have raised any errors."""
        if self._records:
            self._records.close()
        self._tell("close")

    def _tell(self, method: str, *args: object) -> None:
        """Calls a method of all writers; only some have `write_images`."""
        for name, writer in list(self._writers.items()):
            try:
                if method != "write_images" or hasattr(writer, method):
                    getattr(writer, method)(*args)
            except Exception as e:  # a failing tracking service must not end a run
                log.warning("%s failed and gets no more metrics: %s: %s", name, type(e).__name__, reason(e))
                del self._writers[name]


class TensorBoard:
    """Writes an event file in `folder` by the package tensorboard, without TensorFlow.

    A run that resumes at `step` tells TensorBoard to drop the later steps of the files before.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        paths.make_folder(folder)
        # TensorBoard reads files of such names, in their order.
        self._file = AppendedFile(folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if step:
            self._write(step=step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write_hparams(self, hparams: JsonObject) -> None:
        """Writes the hyperparameters."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        self._write(summary=hparams_pb(hparams))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(step=step, summary=self._summary(value=values))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images [n, h, w, c] or [h, w, c] of one to four channels, uint8 or f32 in [0, 1]."""
        from tensorboard.plugins.image.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        for tag, array in images.items():
            pixels = to_uint8(array if array.ndim == 4 else array[None])
            height, width = pixels.shape[1:3]
            tensor = make_tensor_proto([str(width).encode(), str(height).encode(), *map(_to_png, pixels)])
            metadata = create_summary_metadata(display_name=None, description=None)
            value = self._summary.Value(tag=tag, tensor=tensor, metadata=metadata)
            self._write(step=step, summary=self._summary(value=[value]))

    def flush(self) -> None:
        """Returns when all is written."""
        self._records.flush()

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _write(self, **fields: object) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


def _to_png(pixels: np.ndarray) -> bytes:
    """An image u8[h, w, c] as a PNG."""
    file = io.BytesIO()
    to_pillow(pixels).save(file, "PNG")
    return file.getvalue()


@contextlib.contextmanager
def _naming_errors(path: Path) -> Iterator[None]:
    """Inside, turns an OSError into a UserError that says that `path` could not be written."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path} could not be written: {reason(e)}; free some space or repair the disk, and run the "
                        "same command again") from e  # fmt: skip


def find_factories(specs: str, workdir: Path, step: int) -> dict[str, Callable[[], Writer]]:
    """The functions that make the writers of the key `writers`, by spec.

    The user's function is passed `workdir` and `step` if it has parameters of these names. Raises UserError if it
    cannot be imported or called with the arguments of its spec.
    """
    factories, passed = dict[str, Callable[[], Writer]](), {"workdir": workdir, "step": step}
    for call in spec.parse(specs):
        function = spec.bind(call, {}, "writer", by_name=passed)
        takes = inspect.signature(function.func).parameters.keys() - function.keywords.keys()
        factories[str(call)] = functools.partial(function, **{name: passed[name] for name in takes & passed.keys()})
    return factories


def read_metrics(path: Path) -> list[JsonObject]:
    """Reads the records of a `metrics.jsonl`, skipping damaged lines, which a crash may leave; [] without a file."""
    return parse_records(paths.read(path), str(path)) if path.is_file() else []


def parse_records(content: bytes, where: str, strict: bool = False) -> list[JsonObject]:
    """Parses the records, each with its `step`, in the content of the file `where`; skips damaged lines.

    If `strict`, raises UserError for damage that no crash leaves: a crash truncates only the last line.
    """
    records, damaged, torn = [], 0, False
    for line in io.BytesIO(content):
        record = None
        if not line.isspace():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line.decode("utf-8", "replace"))
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            damaged += 1
            torn = not line.endswith(b"\n")
    if strict and damaged > torn:
        raise UserError(f"{where} is damaged: {damaged:,} of its {damaged + len(records):,} lines hold no record; "
                        "restore the file from a copy of the run or from its bundle")  # fmt: skip
    if damaged:
        log.warning("%s: skipped %s", where, "a truncated line" if damaged == 1 else f"{damaged:,} damaged lines")
    return records

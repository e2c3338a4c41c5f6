"""Writes the numbers of a run: to metrics.jsonl, to TensorBoard and to the terminal."""

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from imgclf_jax.core import places, processes, spec
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.run.event_file import EventFile
from imgclf_jax.run.provenance import parse_json, write_atomically

log = logging.getLogger(__name__)

_MOST_LINES = 1_000_000  # of a file of unknown origin
_MOST_BYTES_OF_A_LINE = 16 << 20


class MetricsWriter:
    """Appends records to `metrics.jsonl` and, if TensorBoard is installed, to its event files in `tb/`.

    A record is one line: {"step": 100, "train/loss": …}. A run that resumes at `step` first drops the records after
    this step, and an incomplete last line after a crash. It then writes the same records again.

    Into a bucket records are written by `sync`, which comes before each checkpoint, and at the end. Those that a killed
    process had not written yet are of steps that are done again.
    """

    def __init__(self, workdir: Path, step: int = 0, tensorboard: bool = True):
        self._directory = workdir
        path = workdir / "metrics.jsonl"
        if step and not path.exists():
            log.warning("%s is missing: it will hold no record of the steps before %d", path, step)
        kept = [r for r in read_metrics(path) if r["step"] <= step]
        # Whether the evaluation of this step is among them. The records of training have a pace.
        self.evaluated = any(r["step"] == step and "train/images_per_second" not in r for r in kept)
        with self._writing():
            self._file = open_records(path, kept)
            self._tensorboard = _open_event_file(workdir / "tb", step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one record. The operating system has it when this returns, so a killed process does not lose it."""
        with self._writing():
            write_record(self._file, {"step": step, **values})
            if self._tensorboard:
                self._tensorboard.write(step, values)

    def sync(self) -> None:
        """Returns when all records are on disk. Called before a checkpoint is saved: its records must not be lost."""
        with self._writing():
            sync_records(self._file)
            if self._tensorboard:
                self._tensorboard.sync()

    def close(self) -> None:
        """Closes the files. Raises nothing: `write` and `sync` have raised what went wrong."""
        for file in (self._file, self._tensorboard):
            with contextlib.suppress(Exception):
                if file:
                    file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(
                f"the metrics in {self._directory} could not be written: {reason(e)}; free some space or "
                "repair the disk, and run the same command again"
            ) from e


class _Whole(io.StringIO):
    """A text file in a bucket, of which objects are written whole."""

    def __init__(self, path: Path):
        super().__init__(path.read_bytes().decode())
        self.seek(0, io.SEEK_END)
        self._path = path

    def write_all(self) -> None:
        self._path.write_bytes(self.getvalue().encode())

    def close(self) -> None:
        self.write_all()
        super().close()


def open_records(path: Path, kept: Iterable[Mapping[str, Any]]) -> IO[str]:
    """A file with a JSON object a line, open to append more of them: it begins anew with those that are `kept`."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
    return _Whole(path) if places.in_bucket(path) else path.open("a", encoding="utf-8")


def write_record(file: IO[str], record: Mapping[str, Any]) -> None:
    """Appends a record. The operating system has it when this returns; of a bucket see `sync_records`."""
    file.write(json.dumps(record) + "\n")
    file.flush()


def sync_records(file: IO[str]) -> None:
    """Returns when all that was written to a file of `open_records` is on the disk or in the bucket."""
    if isinstance(file, _Whole):
        file.write_all()
    else:
        os.fsync(file.fileno())


class NoWriter:
    """The writer of the other processes: process 0 writes for all."""

    evaluated = False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes nothing."""

    def sync(self) -> None:
        """Returns at once."""

    def close(self) -> None:
        """Closes nothing."""


Writer = MetricsWriter | NoWriter


def open_writer(workdir: Path, step: int, tensorboard: bool) -> Writer:
    """The writer of this process. All have process 0's `evaluated`."""
    writer: Writer = NoWriter() if processes.index() else MetricsWriter(workdir, step, tensorboard)
    writer.evaluated = processes.broadcast_from_process_0("reading metrics.jsonl", lambda: writer.evaluated)
    return writer


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without damaged lines, which a crash may leave; [] if there is no file."""
    return parse_records(path.read_bytes(), str(path)) if path.is_file() else []


def parse_records(content: bytes, where: str) -> list[dict[str, Any]]:
    """The records, each with its `step`, in the content of the file `where`; damaged lines are left out."""
    spec.check_bound(content.count(b"\n"), _MOST_LINES, f"lines in {where}")
    records, damaged = [], 0
    for line in io.BytesIO(content):
        record = None
        if len(line) <= _MOST_BYTES_OF_A_LINE and not line.isspace():
            with contextlib.suppress(ValueError, RecursionError):
                record = parse_json(line.decode("utf-8", "replace"))
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            damaged += 1
    if damaged:
        what = "a line cut short was" if damaged == 1 else f"{damaged:,} damaged lines were"
        log.warning("%s: %s left out", where, what)
    return records


def _open_event_file(directory: Path, step: int) -> EventFile | None:
    try:
        return EventFile(directory, step)
    except ImportError:
        log.info("TensorBoard is not installed: its files are not written, metrics.jsonl alone")
        return None

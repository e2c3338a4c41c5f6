"""TensorBoard's event file, by TensorBoard's own record format. Needs no TensorFlow."""

import io
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from imgclf_jax.core import places


class EventFile:
    """A file of scalars in `directory`, which TensorBoard, and its `EventAccumulator.Scalars`, read.

    What the files before it say of steps after `step` counts no more: a run that resumes says it again. Raises
    ImportError if TensorBoard is not installed, and OSError.
    """

    def __init__(self, directory: Path, step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        if not places.in_bucket(directory):
            directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a directory in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._path = directory / name
        self._file: IO[bytes] = io.BytesIO() if places.in_bucket(directory) else self._path.open("wb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(session_log=started, step=step + 1)  # drops what was said of this step and of later ones

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one record; the operating system has it when this returns, or a bucket after the next `sync`."""
        scalars = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=self._summary.Summary(value=scalars))

    def sync(self) -> None:
        """Writes the file to its bucket, if it is to lie in one: an object does not grow."""
        if isinstance(self._file, io.BytesIO):
            self._path.write_bytes(self._file.getvalue())

    def close(self) -> None:
        """Closes the file."""
        self.sync()
        self._file.close()

    def _write(self, **content: Any) -> None:
        self._records.write(self._event.Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()

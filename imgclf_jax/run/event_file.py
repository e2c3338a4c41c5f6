"""TensorBoard's event file in its own record format, without TensorFlow, which CLU's SummaryWriter imports."""

import io
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from imgclf_jax.core import places


class EventFile:
    """A file of scalars in `directory`, which TensorBoard and its `EventAccumulator.Scalars` read.

    TensorBoard then drops the records of steps after `step` in earlier files, since a resumed run writes them again.
    Raises ImportError if TensorBoard is not installed, and OSError.
    """

    def __init__(self, directory: Path, step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        bucket = places.in_bucket(directory)
        if not bucket:
            directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a directory in order of their names.
        self._path = directory / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._file: IO[bytes] = io.BytesIO() if bucket else self._path.open("wb")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START), step=step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the metrics of a step to the operating system; a bucket receives them at `flush`."""
        values = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._add(step=step, summary=self._summary.Summary(value=values))

    def flush(self) -> None:
        """Writes the whole file if it is in a bucket, whose objects cannot be appended to."""
        if isinstance(self._file, io.BytesIO):
            self._path.write_bytes(self._file.getvalue())

    def close(self) -> None:
        """Closes the file."""
        self.flush()
        self._file.close()

    def _add(self, **content: Any) -> None:
        self._records.write(self._event.Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()

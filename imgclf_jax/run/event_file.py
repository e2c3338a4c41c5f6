"""TensorBoard's event file in its own record format, without TensorFlow, which CLU's SummaryWriter imports."""

import io
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from imgclf_jax.core import places


class EventFile:
    """A file of scalars, images and hyperparameters in `directory`, which TensorBoard and its `EventAccumulator` read.

    TensorBoard then drops the records of steps after `step` in earlier files, and all of them if `step` is 0, since a
    resumed run writes them again. Raises ImportError if TensorBoard is not installed, and OSError.
    """

    def __init__(self, directory: Path, step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        bucket = places.in_bucket(directory)
        places.make_folder(directory)
        # TensorBoard reads the files of a directory in order of their names, and the clock may have been set back.
        earlier = [re.match(r"events\.out\.tfevents\.(\d{1,12})\b", file.name) for file in directory.glob("events.*")]
        began = max([time.time(), *(int(found[1]) + 1 for found in earlier if found)])
        self._path = directory / f"events.out.tfevents.{began:.6f}.{socket.gethostname()}"
        self._file: IO[bytes] = io.BytesIO() if bucket else places.open_regular(self._path, "xb")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        first = step + 1 if step else 0  # the images of step 0 are written before the first step
        self._add(session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START), step=first)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the metrics of a step to the operating system; a bucket receives them at `flush`."""
        values = [self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._add(step=step, summary=self._summary.Summary(value=values))

    def write_hparams(self, hparams: Mapping[str, bool | float | str]) -> None:
        """Writes the hyperparameters of the run for TensorBoard's tab of this name."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        self._add(summary=hparams_pb(dict(hparams), trial_id=self._path.parent.parent.name))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images [n, h, w, c] or [h, w, c] of one to four channels, uint8 or f32 in [0, 1], by their tags."""
        from tensorboard.compat.proto import tensor_pb2, types_pb2
        from tensorboard.plugins.image import metadata

        values = []
        for tag, image in images.items():
            several = image[None] if image.ndim == 3 else image
            height, width = several.shape[1:3]
            content = [str(width).encode(), str(height).encode(), *map(_png, several)]
            tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=content)
            tensor.tensor_shape.dim.add(size=len(content))
            kind = metadata.create_summary_metadata(display_name="", description="")
            values.append(self._summary.Summary.Value(tag=tag, tensor=tensor, metadata=kind))
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


def _png(image: np.ndarray) -> bytes:
    pixels = image if image.dtype == np.uint8 else np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] in (1, 2) else pixels[..., :4]).save(content, "PNG")
    return content.getvalue()

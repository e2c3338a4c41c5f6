"""Files of features: one vector per image, with its name and label, written incrementally."""

import contextlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import escape_surrogates

# Adds images to the file: (set, names, labels i32[b], features f32[seeds, b, d]); a label of -1 is unknown.
Add = Callable[[str, Sequence[str], np.ndarray, np.ndarray], None]

_CHUNK = 1 << 20  # bytes


@contextlib.contextmanager
def writing(path: Path, class_names: Sequence[str], with_targets: bool = False) -> Iterator[Add]:
    """A context that yields a function to add images, and writes the file atomically at the end unless an error occurs.

    An .npz has `features` f32[n, d] ([seeds, n, d] for several seeds), `labels` i32[n], `names`, `sets` and
    `class_names`. With `with_targets`, `targets` f32[n, k], NaN if unknown, and `target_names` replace labels and
    classes.

    Memory grows only with names and labels. The header of an .npz has the number of rows, so its features are first
    written to a temporary file next to it, which needs the same space again. Raises UserError if nothing is added.
    """
    with paths.replacing(path) as file:
        with _npz(file, path.parent, class_names, with_targets) as add:
            yield add
        if not file.tell():
            raise UserError(f"cannot write {path}: no image has features")


@contextlib.contextmanager
def _npz(out: BinaryIO, folder: Path, class_names: Sequence[str], with_targets: bool) -> Iterator[Add]:
    names: list[str] = []
    sets: list[str] = []
    labels: list[np.ndarray] = []
    with contextlib.ExitStack() as stack:
        files: list[Any] = []

        def add(name: str, examples: Sequence[str], own: np.ndarray, features: np.ndarray) -> None:
            if not files:
                files.extend(stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in features)
            for file, rows in zip(files, features, strict=True):
                file.write(np.ascontiguousarray(rows, "<f4").data)
            names.extend(map(escape_surrogates, examples))
            sets.extend([name] * len(examples))
            labels.append(np.asarray(own, "<f4" if with_targets else "<i4"))

        yield add
        if not files:
            return
        n, own = len(names), np.concatenate(labels)
        with zipfile.ZipFile(out, "w", allowZip64=True) as archive:
            rows = n, files[0].tell() // 4 // n
            with _member(archive, "features", "<f4", rows if len(files) == 1 else (len(files), *rows)) as member:
                for file in files:
                    file.seek(0)
                    shutil.copyfileobj(file, member, _CHUNK)
            with _member(archive, "targets" if with_targets else "labels", own.dtype.str, own.shape) as member:
                member.write(own.data)
            _write_text(archive, "names", names)
            _write_text(archive, "sets", sets)
            _write_text(
                archive, "target_names" if with_targets else "class_names", list(map(escape_surrogates, class_names))
            )


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[Any]:
    """An array of the file, whose header is written; its bytes follow."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(member, header)
        yield member


def _write_text(archive: zipfile.ZipFile, name: str, texts: Sequence[str]) -> None:
    """Writes strings in chunks, because a NumPy array pads all of them to the longest."""
    dtype = f"<U{max(1, *map(len, texts))}"
    rows = max(1, _CHUNK // np.dtype(dtype).itemsize)
    with _member(archive, name, dtype, (len(texts),)) as member:
        for first in range(0, len(texts), rows):
            member.write(np.array(texts[first : first + rows], dtype).tobytes())

"""A file of features: a vector an image, with its name and label, written as they come."""

import contextlib
import importlib.util
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imgclf_jax.core import places
from imgclf_jax.core.errors import UserError

# Adds images to the file: (their set, names, labels i32[b], features f32[seeds, b, d]); a label of -1 is unknown.
Add = Callable[[str, Sequence[str], np.ndarray, np.ndarray], None]

_KINDS = (".npz", ".parquet")
_AT_ONCE = 1 << 20  # bytes that are copied at a time
_ROWS = 4096  # of a group in a Parquet file


def check(path: Path) -> None:
    """Raises UserError for a file of another kind than .npz or .parquet, before any work is done."""
    if path.suffix not in _KINDS:
        raise UserError(f"--output={path}: the name must end in {_KINDS[0]} or {_KINDS[1]}")
    if path.suffix == ".parquet" and not importlib.util.find_spec("pyarrow"):
        raise UserError(f"--output={path}: pyarrow is not installed, which writes Parquet; name an .npz")
    if not path.parent.is_dir():
        raise UserError(f"--output={path}: there is no directory {str(path.parent)!r}; make it first")


@contextlib.contextmanager
def writing(path: Path, class_names: Sequence[str], with_targets: bool = False) -> Iterator[Add]:
    """Inside, images are added; at the end the file is there, in one piece. After an error it is as it was.

    An .npz has `features` f32[n, d] (of several seeds [seeds, n, d]), `labels` i32[n], `names`, `sets` and
    `class_names`. A .parquet has the columns `set`, `name`, `label`, `class` and `features`, of several seeds
    `features_0`, `features_1`, …, and `class_names` as JSON in its metadata. `with_targets` there are `targets` f32[n,
    k] and `target_names` in place of labels and classes, in a .parquet a column `target[NAME]` each; NaN is not known.

    Memory does not grow with the features, but by the name and the label of each image. An .npz says at its start how
    many rows there are, so its features first lie in a folder beside it, which takes the same room once more. Raises
    UserError if nothing is added.
    """
    writer = _npz if path.suffix == ".npz" else _parquet
    with (
        places.replacing(path) as whole,
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder,
    ):
        temporary = Path(folder) / path.name
        with writer(temporary, class_names, with_targets) as add:
            yield add
        if not temporary.is_file():
            raise UserError(f"{path} is not written: there is no image whose features are known")
        temporary.replace(whole)


@contextlib.contextmanager
def _npz(path: Path, class_names: Sequence[str], with_targets: bool) -> Iterator[Add]:
    names: list[str] = []
    sets: list[tuple[str, int]] = []
    labels: list[np.ndarray] = []
    width: list[int] = []
    with contextlib.ExitStack() as stack:
        files: list[Any] = []

        def add(of: str, called: Sequence[str], own: np.ndarray, features: np.ndarray) -> None:
            if not files:
                files.extend(stack.enter_context((path.parent / f"seed{i}").open("xb")) for i in range(len(features)))
                width.append(features.shape[-1])
            for file, rows in zip(files, features, strict=True):
                file.write(np.ascontiguousarray(rows, "<f4").data)
            names.extend(map(_text, called))
            sets.append((of, len(called)))
            labels.append(np.asarray(own, "<f4" if with_targets else "<i4"))

        yield add
        if not files:
            return
        n = len(names)
        with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
            shape = (n, width[0]) if len(files) == 1 else (len(files), n, width[0])
            with _member(archive, "features", "<f4", shape) as member:
                for file in files:
                    file.close()
                    with Path(file.name).open("rb") as written:
                        shutil.copyfileobj(written, member, _AT_ONCE)
            of_labels = ("labels", "<i4", (n,))
            of_targets = ("targets", "<f4", (n, len(class_names)))
            with _member(archive, *(of_targets if with_targets else of_labels)) as member:
                for part in labels:
                    member.write(part.tobytes())
            _write_text(archive, "names", names)
            longest = max(len(of) for of, _ in sets)
            with _member(archive, "sets", f"<U{longest or 1}", (n,)) as member:
                for of, count in sets:
                    member.write(np.full(count, of, f"<U{longest or 1}").tobytes())
            _write_text(
                archive, "target_names" if with_targets else "class_names", [_text(name) for name in class_names]
            )


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[Any]:
    """An array of the file, whose header is written; its bytes follow."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(member, header)
        yield member


def _write_text(archive: zipfile.ZipFile, name: str, texts: Sequence[str]) -> None:
    """Text has one width in an array, that of the longest; so it is made of a part at a time."""
    dtype = f"<U{max(1, *map(len, texts))}"
    rows = max(1, _AT_ONCE // np.dtype(dtype).itemsize)
    with _member(archive, name, dtype, (len(texts),)) as member:
        for first in range(0, len(texts), rows):
            member.write(np.array(texts[first : first + rows], dtype).tobytes())


@contextlib.contextmanager
def _parquet(path: Path, class_names: Sequence[str], with_targets: bool) -> Iterator[Add]:
    import pyarrow as pa
    from pyarrow import parquet

    classes = [*map(_text, class_names), None]  # the last one is the name of label -1
    waiting: list[Any] = []
    with contextlib.ExitStack() as stack:
        writer: list[Any] = []

        def add(of: str, called: Sequence[str], own: np.ndarray, features: np.ndarray) -> None:
            columns = {
                "set": pa.array([of] * len(called), pa.string()),
                "name": pa.array(list(map(_text, called)), pa.string()),
            }
            if with_targets:
                for of_target, values in zip(class_names, np.asarray(own, np.float32).T, strict=True):
                    columns[f"target[{_text(of_target)}]"] = pa.array(np.ascontiguousarray(values))
            else:
                columns["label"] = pa.array(np.asarray(own, np.int32))
                columns["class"] = pa.array([classes[label] for label in own], pa.string())
            for seed, rows in enumerate(features):
                flat = pa.array(np.ascontiguousarray(rows, np.float32).ravel())
                name = "features" if len(features) == 1 else f"features_{seed}"
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
            waiting.append(pa.table(columns))
            if sum(len(table) for table in waiting) >= _ROWS:
                flush()

        def flush() -> None:
            table = pa.concat_tables(waiting)
            table = table.replace_schema_metadata(
                {"target_names" if with_targets else "class_names": json.dumps(list(class_names))}
            )
            if not writer:
                writer.append(stack.enter_context(parquet.ParquetWriter(path, table.schema)))
            writer[0].write_table(table)
            waiting.clear()

        yield add
        if waiting:
            flush()


def _text(name: str) -> str:
    """A name that is text in any file: bytes of a file's name that are no UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()

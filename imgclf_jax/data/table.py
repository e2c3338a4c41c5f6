"""Images that a table lists, CSV or Parquet: a row an example, with its file, and its label or targets."""

import concurrent.futures
import csv
import hashlib
import itertools
import logging
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imgclf_jax.core import memory, places
from imgclf_jax.core.errors import UserError, reason, unknown
from imgclf_jax.core.split_folders import split_order
from imgclf_jax.data import image_check
from imgclf_jax.data.arrays import MOST_CLASSES, check_finite
from imgclf_jax.data.decode import FORMATS
from imgclf_jax.data.file_source import LISTING, FileSource, name_unreadable, numbers
from imgclf_jax.data.image_files import Stamp

log = logging.getLogger(__name__)

# The names of columns that are understood, in any capitals.
_KNOWN = {
    "file": ("file", "filename", "file_name", "filepath", "file_path", "path", "image", "image_path"),
    "label": ("label", "class", "class_name"),
    "split": ("split",),
    "weight": ("weight", "sample_weight"),
}
_TIMES_IN_MEMORY = 20  # of a table's bytes: a cell is a Python object


@dataclass(frozen=True)
class _Table:
    """The columns of a table, and what its rows are called in errors."""

    path: Path
    columns: Mapping[str, Sequence[Any]]
    rows: Sequence[str]

    def fail(self, row: int, what: str) -> UserError:
        return UserError(f"table: {self.path}, {self.rows[row]}: {what}")

    def find(self, kind: str, asked: str | None, required: bool = False) -> str:
        """The name of the column of a kind: the one asked for, or the one whose name says so; "" for none."""
        if asked is None:
            return ""
        if asked:
            if asked not in self.columns:
                raise UserError(f"table: {self.path}: " + unknown("column", asked, self.columns))
            return asked
        found = [name for name in self.columns if name.lower() in _KNOWN[kind]]
        if len(found) > 1:
            names = " and ".join(map(repr, found))
            raise UserError(f"table: {self.path}: the columns {names} may each hold the {kind}; choose one by "
                            f"{kind}={found[0]!r}")  # fmt: skip
        if not found and required:
            raise UserError(f"table: {self.path} has the columns {', '.join(map(repr, self.columns))}; name the one "
                            f"with the {kind} by {kind}='…'" + " or those with targets by targets=('…',)" * (
                                kind == "label"))  # fmt: skip
        return found[0] if found else ""

    def text(self, column: str, what: str) -> list[str]:
        """A column as text. Raises UserError naming the first row where it is empty."""
        values = [_as_text(value) for value in self.columns[column]]
        if "" in values:
            raise self.fail(values.index(""), f"the column {column!r} is empty; it must hold the {what}")
        return values


def table(
    path: str,
    label: str = "",
    targets: str | tuple[str, ...] = (),
    split: str | None = "",
    weight: str | None = "",
    file: str = "",
    root: str = "",
    classes: tuple[str, ...] = (),
    *,
    unreadable: str = "error",
    formats: tuple[str, ...] = FORMATS,
    host_ops: tuple[str, ...] = (),
) -> dict[str, FileSource]:
    """The images that a .csv, .tsv or .parquet file lists, a row each, by the names in its column `split`.

    `file`, `label`, `split` and `weight` name columns; where they are not given, a column that is called so, see
    `_KNOWN`, is used. Without a column `split`, or with split=None, all rows are the split `train`. `targets` names
    columns of numbers, which examples then have in place of labels. Files are relative to `root`, the table's folder
    unless given; a path may be absolute, but not lead out of the root by `..`. `classes` names the classes in their
    order; otherwise they are the labels, sorted, whole numbers by their value.

    Files are checked at the start as those of `folder` are, with the same `unreadable`, `formats` and `host_ops`.
    Raises UserError naming the column, row or file at fault.
    """
    if unreadable not in ("error", "skip"):
        raise UserError(unknown("value of unreadable", unreadable, ("error", "skip")))
    place, base = (places.as_path(text).expanduser() for text in (path, root or "."))
    if places.in_bucket(place) or places.in_bucket(base):
        raise UserError(f"table: {path!r} or its root is in a bucket, where many small files are slow to read; mount "
                        "it as a folder (gcsfuse, mountpoint-s3), or use a TFDS data set there")  # fmt: skip
    if not place.is_file():
        raise UserError(f"table: there is no file {str(place)!r} (working directory: {Path.cwd()})")
    base = base if root else place.parent
    if not base.is_dir():
        raise UserError(f"table: root={root!r} is no directory (working directory: {Path.cwd()})")
    if label and targets:
        raise UserError("table: label and targets are both given; an example has one or the other")
    found = _read(place)
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    kinds = {
        "file": found.find("file", file, required=True),
        "label": "" if targets else found.find("label", label, required=True),
        "split": found.find("split", split),
        "weight": found.find("weight", weight),
    }
    files = _files(found, kinds["file"])
    labels, class_names = (None, targets) if targets else _labels(found, kinds["label"], classes)
    parts = _splits(found, kinds["split"])
    stamps, bad = _stamps(base, set(files))
    checked = image_check.check(base, stamps, unreadable == "skip", formats, host_ops, key=place)
    bad |= checked.unreadable
    whole = FileSource(
        base, tuple(files), labels, tuple(stamps.get(one, (0,))[0] for one in files), class_names,
        digests=tuple(checked.digests.get(one, "") for one in files),
        targets=_targets(found, targets) if targets else None,
        table=hashlib.sha256(place.read_bytes()).hexdigest(), columns=found.columns, weight=kinds["weight"],
    )  # fmt: skip
    order = sorted(range(len(files)), key=lambda i: (hashlib.sha256(os.fsencode(files[i])).digest(), i))
    out = {name: whole.select(np.array([i for i in order if parts[i] == name], np.int64))
           for name in sorted(set(parts), key=split_order)}  # fmt: skip
    if bad:
        if len(bad) == len(set(files)) and not stamps:
            raise UserError(f"table: none of the {len(bad)} files that {place} lists is in {base}, such as "
                            f"{sorted(bad)[0]!r}; name the folder that they are in by root='…'")  # fmt: skip
        name_unreadable("table", place, {str(base / one): why for one, why in bad.items()}, unreadable)
        out = {name: _without(source, name, bad, place, () if classes or targets else class_names)
               for name, source in out.items()}  # fmt: skip
    _warn_of_duplicates(place, out)
    used = [f"{kind} {name!r}" for kind, name in kinds.items() if name] + [f"target {name!r}" for name in targets]
    log.info("%s: %s; columns used: %s", place, ", ".join(f"{len(source)} in {name}" for name, source in out.items()),
             ", ".join(used))  # fmt: skip
    return out


def _files(found: _Table, column: str) -> list[str]:
    """The files of the rows, relative to the root or absolute, as they are written."""
    files = found.text(column, "file")
    for row, text in enumerate(files):
        clean = os.path.normpath(text)
        if "://" in text or "\0" in text:
            raise found.fail(row, f"{text!r} is no file on this machine")
        if clean == ".." or clean.startswith(f"..{os.sep}"):
            raise found.fail(row, f"{text!r} leads out of the root; choose another root, or write an absolute path")
        files[row] = clean
    return files


def _labels(found: _Table, column: str, classes: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """(labels i32[n], class names)."""
    texts = found.text(column, "label")
    classes = (classes,) if isinstance(classes, str) else classes
    names = tuple(map(str, classes)) or tuple(sorted(set(texts), key=_class_order(texts)))
    if not 2 <= len(names) <= MOST_CLASSES or len(set(names)) < len(names):
        raise UserError(f"table: {found.path} has {len(set(names))} classes, {len(names)} with repetitions; expected 2 "
                        f"to {MOST_CLASSES:,} different ones")  # fmt: skip
    number = {name: i for i, name in enumerate(names)}
    if wrong := [row for row, text in enumerate(texts) if text not in number]:
        raise found.fail(wrong[0], f"the label {texts[wrong[0]]!r} is not among classes={names[:5]}")
    return np.array([number[text] for text in texts], np.int32), names


def _class_order(texts: Sequence[str]) -> Callable[[str], Any]:
    """The key by which class names are sorted: whole numbers by their value."""
    return (lambda text: (int(text), text)) if all(re.fullmatch(r"-?\d{1,18}", text) for text in texts) else str


def _targets(found: _Table, columns: Sequence[str]) -> np.ndarray:
    if len(set(columns)) < len(columns):
        raise UserError(f"table: targets={tuple(columns)!r} names a column twice")
    for column in columns:
        found.find("label", column)
    with np.errstate(over="ignore"):
        each = [numbers(column, found.columns[column], found.fail) for column in columns]
        values = np.stack(each, 1).astype(np.float32)  # [n, k]
    check_finite(values, lambda row: f"table: {found.path}, {found.rows[row]}")
    return values


def _splits(found: _Table, column: str) -> list[str]:
    """The split of each row."""
    if not column:
        return ["train"] * len(found.rows)
    parts = found.text(column, "split, or pass split=None")
    for row, name in enumerate(parts):
        if not re.fullmatch(r"[\w.-]+", name):
            raise found.fail(row, f"the split {name!r}: allowed are letters, digits, '_', '.' and '-'")
    return parts


def _stamps(root: Path, files: set[str]) -> tuple[dict[str, Stamp], dict[str, str]]:
    """({file: stamp}, {file: why it cannot be read}); each is relative to the root, or absolute."""

    def stamp(file: str) -> Stamp | str:
        try:
            found = os.stat(root / file)
        except OSError as e:
            return e.strerror or str(e)
        return (found.st_size, found.st_mtime_ns, found.st_ctime_ns) if stat.S_ISREG(found.st_mode) else "no file"

    names = sorted(files)
    with concurrent.futures.ThreadPoolExecutor(LISTING) as pool:
        results = dict(zip(names, pool.map(stamp, names), strict=True))
    return ({file: found for file, found in results.items() if not isinstance(found, str)},
            {file: found for file, found in results.items() if isinstance(found, str)})  # fmt: skip


def _without(source: FileSource, name: str, bad: Mapping[str, str], place: Path, classes: Sequence[str]) -> FileSource:
    """The split without these files. Raises UserError where it, or one of its classes, loses all of its images."""
    kept = source.without(bad)
    if not len(kept):
        raise UserError(f"table: the split {name!r} of {place} has no readable image; repair some or remove its rows")
    if classes and source.labels is not None and kept.labels is not None:
        gone = set(source.labels.tolist()) - set(kept.labels.tolist())
        if gone:
            raise UserError(f"table: the class {classes[min(gone)]!r} has no readable image in the split {name!r} of "
                            f"{place}; repair some or remove its rows")  # fmt: skip
    return kept


def _warn_of_duplicates(place: Path, splits: Mapping[str, FileSource]) -> None:
    paths = {name: {os.path.join(source.root, file) for file in source.files} for name, source in splits.items()}
    for name, source in splits.items():
        if len(source) > len(paths[name]):
            log.warning("%s: split %s has %d rows of %d different files", place, name, len(source), len(paths[name]))
    for a, b in itertools.combinations(splits, 2):
        if both := paths[a] & paths[b]:
            log.warning("%s: splits %s and %s share %d of their files, such as %s: metrics on one are no test of a "
                        "model trained on the other", place, a, b, len(both), min(both))  # fmt: skip


def _as_text(value: Any) -> str:
    """A cell as text, without the white space around it. pandas writes whole numbers beside empty cells as floats."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value).strip()


def _read(path: Path) -> _Table:
    """Raises UserError for a file that is no table, or one without rows."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".parquet"):
        raise UserError(f"table: {path} must be a .csv, .tsv or .parquet file")
    memory.require(_TIMES_IN_MEMORY * path.stat().st_size, f"table: {path}")
    found = _read_parquet(path) if suffix == ".parquet" else _read_csv(path, "," if suffix == ".csv" else "\t")
    if not found.rows:
        raise UserError(f"table: {path} has no rows")
    return found


def _read_csv(path: Path, delimiter: str) -> _Table:
    rows, lines = [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next((row for row in reader if row), [])]
            for row in reader:
                if row and len(row) != len(header):
                    raise UserError(f"table: {path}, line {reader.line_num} has {len(row)} fields, and the header "
                                    f"{len(header)}; they are separated by {delimiter!r}")  # fmt: skip
                if row:
                    rows.append(row)
                    lines.append(f"line {reader.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"table: cannot read {path} as text in UTF-8 with fields separated by {delimiter!r}: "
                        f"{reason(e)}") from e  # fmt: skip
    if len(set(header)) < len(header):
        raise UserError(f"table: {path} has two columns of one name among {header}")
    return _Table(path, {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}, lines)


def _read_parquet(path: Path) -> _Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise UserError(f"table: {path}: pyarrow reads Parquet and is not installed; install it by `uv sync --extra "
                        "parquet`, or save the table as .csv") from e  # fmt: skip
    try:
        with parquet.ParquetFile(path) as content:
            groups = range(content.metadata.num_row_groups)
            nbytes = sum(content.metadata.row_group(i).total_byte_size for i in groups)  # before compression
            memory.require(_TIMES_IN_MEMORY * nbytes, f"table: {path}")
            names = [field.name for field in content.schema_arrow if not pyarrow.types.is_nested(field.type)]
            data = content.read(columns=names)
        columns = {name: data.column(name).to_pylist() for name in names}
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"table: cannot read {path} as Parquet: {reason(e)}") from e
    return _Table(path, columns, [f"row {i}" for i in range(1, data.num_rows + 1)])

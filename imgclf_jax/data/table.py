"""Images listed in a CSV table: a row per example, with its file and its label or targets."""

import concurrent.futures
import csv
import hashlib
import io
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
from imgclf_jax.core.errors import UserError, no_such, reason, unknown
from imgclf_jax.core.split_folders import split_order
from imgclf_jax.data import image_check
from imgclf_jax.data.arrays import MOST_CLASSES, check_finite
from imgclf_jax.data.decode import FORMATS
from imgclf_jax.data.file_source import LISTING, FileSource, numbers, report_unreadable
from imgclf_jax.data.image_files import Stamp

log = logging.getLogger(__name__)

# The recognized column names, in any case.
_KNOWN = {
    "file": ("file", "filename", "file_name", "filepath", "file_path", "path", "image", "image_path"),
    "label": ("label", "class", "class_name"),
    "split": ("split",),
    "weight": ("weight", "sample_weight"),
}
_MEMORY_RATIO = 20  # of a table in memory to its bytes: each cell is a Python object


@dataclass(frozen=True)
class _Table:
    """The columns of a table, and the names of its rows in errors."""

    path: Path
    columns: Mapping[str, list[str]]
    rows: Sequence[str]

    def fail(self, row: int, message: str) -> UserError:
        return UserError(f"table: {self.path}, {self.rows[row]}: {message}")

    def find(self, kind: str, name: str | None, required: bool = False) -> str:
        """The column of a kind: `name`, or if that is "" the one with a recognized name; "" for none."""
        if name is None:
            return ""
        if name:
            if name not in self.columns:
                raise UserError(f"table: {self.path}: " + unknown("column", name, self.columns))
            return name
        matches = [column for column in self.columns if column.lower() in _KNOWN[kind]]
        if len(matches) > 1:
            names = " and ".join(map(repr, matches))
            raise UserError(f"table: {self.path}: the columns {names} may each hold the {kind}; choose one by "
                            f"{kind}={matches[0]!r}")  # fmt: skip
        if not matches and required:
            raise UserError(f"table: {self.path} has the columns {', '.join(map(repr, self.columns))}; name the one "
                            f"with the {kind} by {kind}='…'" + " or those with targets by targets=('…',)" * (
                                kind == "label"))  # fmt: skip
        return matches[0] if matches else ""

    def text(self, column: str, what: str) -> list[str]:
        """A column as text. Raises UserError naming its first empty row."""
        values = self.columns[column]
        if "" in values:
            raise self.fail(values.index(""), f"the column {column!r} is empty; it must hold the {what}")
        return values


def table(
    path: str, label: str = "", targets: str | tuple[str, ...] = (), split: str | None = "", weight: str | None = "",
    file: str = "", root: str = "", classes: tuple[str, ...] = (), *, unreadable: str = "error",
    formats: tuple[str, ...] = FORMATS,
) -> dict[str, FileSource]:  # fmt: skip
    """Reads the splits of images listed in a .csv or .tsv file, a row per example.

    - `file`, `label`, `split` and `weight` name columns; by default those with a recognized name, see `_KNOWN`. Without
      a column `split`, or with split=None, all rows are the split `train`.
    - `targets` names columns of numbers, which replace labels.
    - `root` is the folder of the files, by default the table's. A path may be absolute, but not leave the root by `..`.
    - `classes` names the classes in order; by default they are the sorted labels, whole numbers by value.

    Files are checked at the start like those of `folder`, with the same `unreadable` and `formats`. Raises
    UserError naming the column, row or file at fault.
    """
    if unreadable not in ("error", "skip"):
        raise UserError(unknown("value of unreadable", unreadable, ("error", "skip")))
    file_path, base = (places.expand_user(text) for text in (path, root or "."))
    if places.in_bucket(file_path) or places.in_bucket(base):
        raise UserError(f"table: {path!r} or its root is in a bucket, where many small files are slow to read; mount "
                        "it as a folder (gcsfuse, mountpoint-s3), or use a TFDS data set there")  # fmt: skip
    if not file_path.is_file():
        raise no_such("table", "file", file_path)
    base = base if root else file_path.parent
    if not base.is_dir():
        raise no_such("table: root", "directory", root)
    if label and targets:
        raise UserError("table: label and targets are both set; set one of them")
    content = _read(file_path)
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    kinds = {
        "file": content.find("file", file, required=True),
        "label": "" if targets else content.find("label", label, required=True),
        "split": content.find("split", split),
        "weight": content.find("weight", weight),
    }
    files = _files(content, kinds["file"])
    labels, class_names = (None, targets) if targets else _labels(content, kinds["label"], classes)
    parts = _splits(content, kinds["split"])
    stamps, bad = _stamps(base, set(files))
    checked = image_check.check(base, stamps, unreadable == "skip", formats, key=file_path)
    bad |= checked.unreadable
    source = FileSource(
        base, tuple(files), labels, tuple(stamps.get(name, (0,))[0] for name in files), class_names,
        digests=tuple(checked.digests.get(name, "") for name in files),
        targets=_targets(content, targets) if targets else None,
        table=hashlib.sha256(places.read(file_path)).hexdigest(), columns=content.columns, weight=kinds["weight"],
    )  # fmt: skip
    order = sorted(range(len(files)), key=lambda i: (hashlib.sha256(os.fsencode(files[i])).digest(), i))
    out = {name: source.select(np.array([i for i in order if parts[i] == name], np.int64))
           for name in sorted(set(parts), key=split_order)}  # fmt: skip
    if bad:
        if len(bad) == len(set(files)) and not stamps:
            raise UserError(f"table: none of the {len(bad)} files that {file_path} lists is in {base}, such as "
                            f"{sorted(bad)[0]!r}; name their folder by root='…'")  # fmt: skip
        report_unreadable("table", file_path, {str(base / name): why for name, why in bad.items()}, unreadable)
        out = {name: _without(split_source, name, bad, file_path, () if classes or targets else class_names)
               for name, split_source in out.items()}  # fmt: skip
    _warn_of_duplicates(file_path, out)
    note = {"weight": " (only for data.sampling='weighted')"}
    used = [f"{kind} {name!r}{note.get(kind, '')}" for kind, name in kinds.items() if name]
    used += [f"target {name!r}" for name in targets]
    log.info("%s: %s; columns used: %s", file_path, ", ".join(f"{len(one)} in {name}" for name, one in out.items()),
             ", ".join(used))  # fmt: skip
    return out


def _files(content: _Table, column: str) -> list[str]:
    """The normalized files of the rows, relative to the root or absolute."""
    files = content.text(column, "file")
    for row, text in enumerate(files):
        clean = os.path.normpath(text)
        if "://" in text or "\0" in text:
            raise content.fail(row, f"{text!r} is not a file on this machine; write a path")
        if clean == ".." or clean.startswith(f"..{os.sep}"):
            raise content.fail(row, f"{text!r} leaves the root; choose another root, or write an absolute path")
        files[row] = clean
    return files


def _labels(content: _Table, column: str, classes: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns (labels i32[n], class names)."""
    texts = content.text(column, "label")
    classes = (classes,) if isinstance(classes, str) else classes
    names = tuple(map(str, classes)) or tuple(sorted(set(texts), key=_class_order(texts)))
    if not 2 <= len(names) <= MOST_CLASSES or len(set(names)) < len(names):
        raise UserError(f"table: {content.path} has {len(set(names))} classes, {len(names)} with repetitions; expected "
                        f"2 to {MOST_CLASSES:,} distinct ones")  # fmt: skip
    number = {name: i for i, name in enumerate(names)}
    if wrong := [row for row, text in enumerate(texts) if text not in number]:
        raise content.fail(wrong[0], f"the label {texts[wrong[0]]!r} is not among classes={names[:5]}")
    return np.array([number[text] for text in texts], np.int32), names


def _class_order(texts: Sequence[str]) -> Callable[[str], Any]:
    """The sort key of class names: whole numbers by value."""
    return (lambda text: (int(text), text)) if all(re.fullmatch(r"-?\d{1,18}", text) for text in texts) else str


def _targets(content: _Table, columns: Sequence[str]) -> np.ndarray:
    if len(set(columns)) < len(columns):
        raise UserError(f"table: targets={tuple(columns)!r} names a column twice")
    for column in columns:
        content.find("label", column)
    with np.errstate(over="ignore"):
        by_column = [numbers(column, content.columns[column], content.fail) for column in columns]
        values = np.stack(by_column, 1).astype(np.float32)  # [n, k]
    check_finite(values, lambda row: f"table: {content.path}, {content.rows[row]}")
    return values


def _splits(content: _Table, column: str) -> list[str]:
    """The split of each row."""
    if not column:
        return ["train"] * len(content.rows)
    parts = content.text(column, "split, or pass split=None")
    for row, name in enumerate(parts):
        if not re.fullmatch(r"[\w.-]+", name):
            raise content.fail(row, f"the split {name!r}: allowed are letters, digits, '_', '.' and '-'")
    return parts


def _stamps(root: Path, files: set[str]) -> tuple[dict[str, Stamp], dict[str, str]]:
    """Returns ({file: stamp}, {file: why it is unreadable}) for files relative to the root or absolute."""

    def stamp(file: str) -> Stamp | str:
        try:
            status = os.stat(root / file)
        except OSError as e:
            return e.strerror or str(e)
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    names = sorted(files)
    with concurrent.futures.ThreadPoolExecutor(LISTING) as pool:
        results = dict(zip(names, pool.map(stamp, names), strict=True))
    return ({file: result for file, result in results.items() if not isinstance(result, str)},
            {file: result for file, result in results.items() if isinstance(result, str)})  # fmt: skip


def _without(source: FileSource, name: str, bad: Mapping[str, str], table: Path, classes: Sequence[str]) -> FileSource:
    """The split without these files. Raises UserError if it, or one of its classes, loses all its images."""
    kept = source.without(bad)
    if not len(kept):
        raise UserError(f"table: the split {name!r} of {table} has no readable image; repair some or remove its rows")
    if classes and source.labels is not None and kept.labels is not None:
        gone = set(source.labels.tolist()) - set(kept.labels.tolist())
        if gone:
            raise UserError(f"table: the class {classes[min(gone)]!r} has no readable image in the split {name!r} of "
                            f"{table}; repair some or remove its rows")  # fmt: skip
    return kept


def _warn_of_duplicates(table: Path, splits: Mapping[str, FileSource]) -> None:
    paths = {name: {os.path.join(source.root, file) for file in source.files} for name, source in splits.items()}
    for name, source in splits.items():
        if len(source) > len(paths[name]):
            log.warning("%s: split %s has %d rows for %d distinct files", table, name, len(source), len(paths[name]))
    for a, b in itertools.combinations(splits, 2):
        if both := paths[a] & paths[b]:
            log.warning("%s: splits %s and %s share %d of their files, such as %s, so metrics on one do not "
                        "test a model trained on the other", table, a, b, len(both), min(both))  # fmt: skip


def _read(path: Path) -> _Table:
    """Reads a table. Raises UserError for another kind of file, and for one without rows."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv"):
        raise UserError(f"table: {path} must be a .csv or .tsv file")
    memory.require(_MEMORY_RATIO * path.stat().st_size, f"table: {path}")
    content = _read_csv(path, "," if suffix == ".csv" else "\t")
    if not content.rows:
        raise UserError(f"table: {path} has no rows")
    return content


def _read_csv(path: Path, delimiter: str) -> _Table:
    rows, lines = [], []
    try:
        text = io.StringIO(places.read(path).decode("utf-8-sig"), newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next((row for row in reader if row), [])]
        for row in reader:
            if row and len(row) != len(header):
                raise UserError(f"table: {path}, line {reader.line_num} has {len(row)} fields, but the header has "
                                f"{len(header)}; separate them by {delimiter!r}")  # fmt: skip
            if row:
                rows.append(row)
                lines.append(f"line {reader.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"table: cannot read {path} as UTF-8 text with fields separated by {delimiter!r}: "
                        f"{reason(e)}") from e  # fmt: skip
    if len(set(header)) < len(header):
        raise UserError(f"table: {path} has two columns with the same name among {header}; rename one")
    return _Table(path, {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}, lines)

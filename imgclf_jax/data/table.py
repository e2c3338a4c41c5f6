"""Images listed in a CSV table: a row per example, with its file and its label or targets."""

import concurrent.futures
import csv
import io
import itertools
import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imgclf_jax.core import memory, paths
from imgclf_jax.core.errors import UserError, no_such, reason, unknown
from imgclf_jax.core.split_folders import split_order
from imgclf_jax.data import image_check
from imgclf_jax.data.decode import FORMATS
from imgclf_jax.data.file_source import LISTING, file_source, hashed, report_unreadable
from imgclf_jax.data.image_files import Stamp
from imgclf_jax.data.source import MAX_CLASSES, Source, check_finite, to_numbers

log = logging.getLogger(__name__)

_MEMORY_RATIO = 20  # of a table in memory to its bytes: each cell is a Python object


@dataclass(frozen=True)
class _Table:
    """The columns of a table, and the line of each row."""

    path: Path
    columns: Mapping[str, list[str]]
    lines: Sequence[int]

    def fail(self, row: int, message: str) -> UserError:
        return UserError(f"table: {self.path}, line {self.lines[row]}: {message}")

    def column(self, name: str, argument: str) -> list[str]:
        """The column that an argument names. Raises UserError if there is none, or an empty cell."""
        if name not in self.columns:
            raise UserError(f"table: {self.path}: {unknown('column', name, self.columns)}; name the one to use by "
                            f"{argument}='…'")  # fmt: skip
        values = self.columns[name]
        if "" in values:
            raise self.fail(values.index(""), f"the column {name!r} is empty; it must hold the {argument}")
        return values


def table(
    path: str, label: str = "label", targets: str | tuple[str, ...] = (), split: str = "split", file: str = "file",
    root: str = "", classes: tuple[str, ...] = (), *, unreadable: str = "error", formats: tuple[str, ...] = FORMATS,
) -> dict[str, Source]:  # fmt: skip
    """Reads the splits of images listed in a .csv or .tsv file, a row per example.

    - `file`, `label` and `split` name columns. Without a column `split`, or with split="", all rows are `train`.
    - `targets` names columns of numbers, which replace labels.
    - `root` is the folder of the files, by default the table's. A path may be absolute, but not leave the root by `..`.
    - `classes` names the classes in order; by default they are the sorted labels, whole numbers by value.

    All columns are `columns` of the source, so `data.sampling` may be weighted by one. Files are checked at the start
    like those of `folder`, with the same `unreadable` and `formats`. Raises UserError naming the column, row or file at
    fault.
    """
    if unreadable not in ("error", "skip"):
        raise UserError(unknown("value of unreadable", unreadable, ("error", "skip")))
    table_path, base = (paths.expand_user(text) for text in (path, root or "."))
    if paths.in_bucket(table_path) or paths.in_bucket(base):
        raise UserError(f"table: {path!r} or its root is in a bucket, where many small files are slow to read; mount "
                        "it as a folder (gcsfuse, mountpoint-s3), or use a TFDS data set there")  # fmt: skip
    if not table_path.is_file():
        raise no_such("table", "file", table_path)
    base = base if root else table_path.parent
    if not base.is_dir():
        raise no_such("table: root", "directory", root)
    content = _read(table_path)
    files = _files(content, file)
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    labels, class_names = _targets(content, targets) if targets else _labels(content, label, classes)
    splits = ["train"] * len(files)
    if split and (split != "split" or split in content.columns):
        splits = content.column(split, "split")
    for row, name in enumerate(splits):
        if not re.fullmatch(r"[\w.-]+", name):
            raise content.fail(row, f"the split {name!r}: allowed are letters, digits, '_', '.' and '-'")

    stamps, bad = _stamps(base, set(files))
    checked = image_check.check(base, stamps, unreadable == "skip", formats, key=table_path)
    bad |= checked.unreadable
    if bad and not stamps:
        raise UserError(f"table: none of the {len(bad)} files that {table_path} lists is in {base}, such as "
                        f"{sorted(bad)[0]!r}; name their folder by root='…'")  # fmt: skip
    if bad:
        report_unreadable("table", table_path, {str(base / name): why for name, why in bad.items()}, unreadable)
    out = {}
    for name in sorted(set(splits), key=split_order):
        rows = [row for row, other in enumerate(splits) if other == name]
        kept = sorted((row for row in rows if files[row] not in bad), key=lambda row: (hashed(files[row]), row))
        _check_kept(content, name, labels, rows, kept, () if classes or targets else class_names)
        skipped = {files[row] for row in rows} & bad.keys()
        columns = {column: [values[row] for row in kept] for column, values in content.columns.items()}
        out[name] = file_source(base, [files[row] for row in kept], labels[kept], class_names, checked.digests,
                                tuple(skipped), columns)  # fmt: skip
    _warn_of_duplicates(table_path, out)
    log.info("%s: %s", table_path, ", ".join(f"{source.size} in {name}" for name, source in out.items()))
    return out


def _files(content: _Table, column: str) -> list[str]:
    """The normalized files of the rows, relative to the root or absolute."""
    files = []
    for row, text in enumerate(content.column(column, "file")):
        clean = os.path.normpath(text)
        if "://" in text or "\0" in text:
            raise content.fail(row, f"{text!r} is not a file on this machine; write a path")
        if clean == ".." or clean.startswith(f"..{os.sep}"):
            raise content.fail(row, f"{text!r} leaves the root; choose another root, or write an absolute path")
        files.append(clean)
    return files


def _labels(content: _Table, column: str, classes: str | Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns (labels i32[n], class names)."""
    texts = content.column(column, "label")
    names = tuple(map(str, (classes,) if isinstance(classes, str) else classes))
    if not names:
        whole = all(re.fullmatch(r"-?\d{1,18}", text) for text in texts)
        names = tuple(sorted(set(texts), key=(lambda text: (int(text), text)) if whole else None))
    if not 2 <= len(names) <= MAX_CLASSES or len(set(names)) < len(names):
        raise UserError(f"table: {content.path} has {len(set(names))} classes, {len(names)} with repetitions; expected "
                        f"2 to {MAX_CLASSES:,} distinct ones")  # fmt: skip
    number = {name: i for i, name in enumerate(names)}
    if wrong := [row for row, text in enumerate(texts) if text not in number]:
        raise content.fail(wrong[0], f"the label {texts[wrong[0]]!r} is not among classes={names[:5]}")
    return np.array([number[text] for text in texts], np.int32), names


def _targets(content: _Table, names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns (targets f32[n, k], their names)."""
    if len(set(names)) < len(names):
        raise UserError(f"table: targets={names!r} names a column twice")
    with np.errstate(over="ignore"):
        columns = [to_numbers(name, content.column(name, "targets"), content.fail) for name in names]
        targets = np.stack(columns, 1).astype(np.float32)
    check_finite(targets, lambda row: f"table: {content.path}, line {content.lines[row]}")
    return targets, names


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


def _check_kept(
    content: _Table, split: str, labels: np.ndarray, rows: Sequence[int], kept: Sequence[int], classes: Sequence[str]
) -> None:
    """Raises UserError if a split, or one of these classes in it, loses all its images."""
    if not kept:
        raise UserError(f"table: the split {split!r} of {content.path} has no readable image; repair some or remove "
                        "its rows")  # fmt: skip
    if classes and (gone := set(labels[rows].tolist()) - set(labels[kept].tolist())):
        raise UserError(f"table: the class {classes[min(gone)]!r} has no readable image in the split {split!r} of "
                        f"{content.path}; repair some or remove its rows")  # fmt: skip


def _warn_of_duplicates(table: Path, splits: Mapping[str, Source]) -> None:
    files = {name: {source.example_name(i) for i in range(source.size)} for name, source in splits.items()}
    for name, source in splits.items():
        if source.size > len(files[name]):
            log.warning("%s: split %s has %d rows for %d distinct files", table, name, source.size, len(files[name]))
    for a, b in itertools.combinations(splits, 2):
        if both := files[a] & files[b]:
            log.warning("%s: splits %s and %s share %d of their files, such as %s, so metrics on one do not "
                        "test a model trained on the other", table, a, b, len(both), min(both))  # fmt: skip


def _read(path: Path) -> _Table:
    """Reads a table. Raises UserError for another kind of file, and for one without rows."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv"):
        raise UserError(f"table: {path} must be a .csv or .tsv file")
    memory.require(_MEMORY_RATIO * path.stat().st_size, f"table: {path}")
    delimiter = "," if suffix == ".csv" else "\t"
    rows, lines = [], []
    try:
        text = io.StringIO(paths.read(path).decode("utf-8-sig"), newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next((row for row in reader if row), [])]
        for row in reader:
            if row and len(row) != len(header):
                raise UserError(f"table: {path}, line {reader.line_num} has {len(row)} fields, but the header has "
                                f"{len(header)}; separate them by {delimiter!r}")  # fmt: skip
            if row:
                rows.append(row)
                lines.append(reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"table: cannot read {path} as UTF-8 text with fields separated by {delimiter!r}: "
                        f"{reason(e)}") from e  # fmt: skip
    if len(set(header)) < len(header):
        raise UserError(f"table: {path} has two columns with the same name among {header}; rename one")
    if not rows:
        raise UserError(f"table: {path} has no rows")
    return _Table(path, {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}, lines)

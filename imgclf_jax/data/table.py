"""Images listed in a CSV table: a row per example, with its file and its label or targets."""

import csv
import io
import itertools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError, no_such, reason, unknown
from imgclf_jax.data.file_source import check_files, file_sources, open_folder
from imgclf_jax.data.source import MAX_CLASSES, Source, check_finite, to_numbers

log = logging.getLogger(__name__)


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
    root: str = "", classes: tuple[str, ...] = (), *, unreadable: str = "error",
) -> dict[str, Source]:  # fmt: skip
    """Reads the splits of images listed in a .csv or .tsv file, a row per example.

    - `file`, `label` and `split` name columns. Without a column `split`, or with split="", all rows are `train`.
    - `targets` names columns of numbers, which replace labels.
    - `root` is the folder of the files, by default the table's. A path may be absolute, but not leave the root by `..`.
    - `classes` names the classes in order; by default they are the sorted labels, whole numbers by value.

    All columns are `columns` of the source, so `data.sampling` may be weighted by one. Files are checked at the start
    like those of `folder`, with the same `unreadable`. Raises UserError naming the column, row or file at fault.
    """
    table_path = paths.as_path(path)
    base = open_folder("table: root", root or str(table_path.parent))
    if not table_path.is_file():
        raise no_such("table", "file", table_path)
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

    checked = check_files("table", base, sorted(set(files)), unreadable)
    out = file_sources(base, files, splits, labels, class_names, checked, content.columns)
    _warn_of_shared_files(table_path, out)
    return out


def _files(content: _Table, column: str) -> list[str]:
    """The normalized files of the rows, relative to the root or absolute."""
    files = [os.path.normpath(text) for text in content.column(column, "file")]
    for row, file in enumerate(files):
        if file.split(os.sep)[0] == "..":
            raise content.fail(row, f"{file!r} leaves the root; choose another root, or write an absolute path")
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


def _warn_of_shared_files(table: Path, splits: Mapping[str, Source]) -> None:
    files = {name: {source.example_name(i) for i in range(source.size)} for name, source in splits.items()}
    for a, b in itertools.combinations(splits, 2):
        if both := files[a] & files[b]:
            log.warning("%s: splits %s and %s share %d of their files, such as %s, so metrics on one do not "
                        "test a model trained on the other", table, a, b, len(both), min(both))  # fmt: skip


def _read(path: Path) -> _Table:
    """Reads a table. Raises UserError for another kind of file, and for one without rows."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv"):
        raise UserError(f"table: {path} must be a .csv or .tsv file")
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

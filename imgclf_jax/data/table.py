"""Images listed in a CSV table: a row per example, with its file and its label or targets."""

import csv
import io
import itertools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError, no_such, reason, unknown
from imgclf_jax.data.file_source import check_files, file_sources, open_folder
from imgclf_jax.data.source import MAX_CLASSES, Source, to_numbers

log = logging.getLogger(__name__)

type Columns = Mapping[str, list[str]]


def table(
    path: str, label: str = "label", targets: str | tuple[str, ...] = (), split: str = "split", file: str = "file",
    root: str = "", classes: tuple[str, ...] = (), *, unreadable: str = "error",
) -> dict[str, Source]:  # fmt: skip
    """Reads the splits of images listed in a .csv or .tsv file, a row per example.

    - `file`, `label` and `split` name columns. Without a column `split`, or with split="", all rows are `train`.
    - `targets` names columns of numbers, which replace labels.
    - `root` is the folder of relative files, by default the table's.
    - `classes` names the classes in order; by default they are the sorted labels, whole numbers by value.

    All columns are `columns` of the source, so `data.sampling` may be weighted by one. Spaces around a cell are
    dropped, but for file names below a header without any. Files are checked at the start like those of `folder`, with
    the same `unreadable`. Raises UserError naming the column, row or file at fault, and for a file with two labels.
    """
    if targets and (classes or label != "label"):
        raise UserError(f"table(targets={targets!r}) replaces labels; leave out label and classes")
    table_path = paths.as_path(path)
    base = open_folder("table: root", root or str(table_path.parent))
    if not table_path.is_file():
        raise no_such("table", "file", table_path)
    columns = _read(table_path, file)
    try:
        files = [os.path.normpath(name) for name in _column(columns, file, "file")]
        targets = (targets,) if isinstance(targets, str) else tuple(targets)
        labels, class_names = _targets(columns, targets) if targets else _labels(columns, label, classes)
        splits = ["train"] * len(files)
        if split and (split != "split" or split in columns):
            splits = _column(columns, split, "split")
        _check_repeated([os.path.join(os.path.abspath(base), name) for name in files], labels)
    except UserError as e:
        raise UserError(f"table: {table_path}: {e}") from e
    checked = check_files("table", base, sorted(set(files)), unreadable)
    out = file_sources(base, files, splits, labels, class_names, checked, columns)
    _warn_of_shared_files(table_path, out)
    return out


def _check_repeated(files: Sequence[str], labels: np.ndarray) -> None:
    """Raises UserError if a file has two labels, or targets."""
    first: dict[str, int] = {}
    for row, name in enumerate(files):
        other = first.setdefault(name, row)
        if other != row and (labels[other] != labels[row]).any():
            raise UserError(f"rows {other + 1} and {row + 1} label {name!r} differently; keep one of them")


def _read(path: Path, file: str) -> Columns:
    """Reads a table. Raises UserError for another kind of file, and for one without rows."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        text = io.StringIO(paths.read(path).decode("utf-8-sig"), newline="")
        rows = [row for row in csv.reader(text, delimiter=delimiter, strict=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"table: cannot read {path} as UTF-8 text with fields separated by {delimiter!r}: "
                        f"{reason(e)}") from e  # fmt: skip
    if len(rows) < 2:
        raise UserError(f"table: {path} has no rows")
    exact = rows[0].index(file) if file in rows[0] else -1
    header, *rows = ([cell if i == exact else cell.strip() for i, cell in enumerate(row)] for row in rows)
    if len(set(header)) < len(header):
        raise UserError(f"table: {path} has two columns with the same name among {header}; rename one")
    if wrong := [row for row in rows if len(row) != len(header)]:
        raise UserError(f"table: {path}: the row {wrong[0]!r:.80} has {len(wrong[0])} fields, but the header has "
                        f"{len(header)}; separate them by {delimiter!r}")  # fmt: skip
    return {name: list(values) for name, values in zip(header, zip(*rows, strict=True), strict=True)}


def _column(columns: Columns, name: str, argument: str) -> list[str]:
    """The column that an argument names. Raises UserError if there is none, or an empty cell."""
    if name not in columns:
        raise UserError(f"{unknown('column', name, columns)}; name the one to use by {argument}='…'")
    if "" in (values := columns[name]):
        raise UserError(f"the column {name!r} is empty in row {values.index('') + 1}; it must hold the {argument}")
    return values


def _labels(columns: Columns, column: str, classes: str | Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns (labels i32[n], class names)."""
    texts = _column(columns, column, "label")
    names = tuple(map(str, (classes,) if isinstance(classes, str) else classes))
    if not names:
        whole = all(re.fullmatch(r"-?\d{1,18}", text) for text in texts)
        names = tuple(sorted(set(texts), key=(lambda text: (int(text), text)) if whole else None))
    if not 2 <= len(names) <= MAX_CLASSES:
        raise UserError(f"it has {len(names)} classes; expected 2 to {MAX_CLASSES:,}")
    number = {name: i for i, name in enumerate(names)}
    if wrong := sorted(set(texts) - set(names)):
        raise UserError(f"the label {wrong[0]!r} is not among classes={names[:5]}")
    return np.array([number[text] for text in texts], np.int32), names


def _targets(columns: Columns, names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns (targets f32[n, k], their names)."""
    with np.errstate(over="ignore"):
        values = [to_numbers(name, _column(columns, name, "targets")) for name in names]
        return np.stack(values, 1).astype(np.float32), names


def _warn_of_shared_files(table: Path, splits: Mapping[str, Source]) -> None:
    files = {name: {source.example_name(i) for i in range(source.size)} for name, source in splits.items()}
    for a, b in itertools.combinations(splits, 2):
        if both := files[a] & files[b]:
            log.warning("%s: splits %s and %s share %d of their files, such as %s, so metrics on one do not "
                        "test a model trained on the other", table, a, b, len(both), min(both))  # fmt: skip

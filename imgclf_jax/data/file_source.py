"""A source of image files, for `folder` and `table`."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from imgclf_jax.core import places
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.text import printable, utf8
from imgclf_jax.core.typing import Examples, Json, Value
from imgclf_jax.data import image_check

log = logging.getLogger(__name__)

LISTING = 16  # concurrent file system requests: a network file system is slow for each, but serves many at a time


@dataclass(frozen=True)
class FileSource:
    """Image files, read as bytes, with labels or targets.

    They are sorted by a hash of their names, so any slice has examples of all classes.
    """

    root: Path
    files: tuple[str, ...]  # relative to root
    labels: np.ndarray | None  # i32[n]
    sizes: tuple[int, ...]  # bytes
    class_names: tuple[str, ...]
    left_out: tuple[str, ...] = ()  # paths of the unreadable files, sorted
    digests: tuple[str, ...] = ()  # of each file's contents: see `image_check`
    targets: np.ndarray | None = None  # f32[n, k] instead of labels; their names are the class names
    table: str = ""  # SHA-256 of the table that lists the files
    columns: Mapping[str, Sequence[Value]] = field(default_factory=dict)  # of the table, n values each
    weight: str = ""  # the column of weights
    thread_safe: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.files)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The names of the targets; () with labels."""
        return () if self.targets is None else self.class_names

    def read(self, ids: np.ndarray) -> Examples:
        ys = {"label": self.labels, "target": self.targets}
        y = {name: values[ids] for name, values in ys.items() if values is not None}
        return {"image": [places.read(self.root / self.files[i]) for i in ids], **y}

    def name(self, i: int) -> str:
        """The file of an example, for error messages."""
        return str(self.root / self.files[i])

    def column(self, name: str = "") -> np.ndarray:
        """A column of the table as f64[n], by default the weights. Raises UserError for an unknown one."""
        name = name or self.weight
        if not name:  # a column may have an empty name, as the index that pandas writes
            raise UserError("the table has no column of weights; name one by weight='…' in data.source")
        if name not in self.columns:
            raise UserError(unknown("column", name, self.columns))
        return numbers(name, self.columns[name], lambda i, what: UserError(f"{self.name(i)}: {what}"))

    def fingerprint(self) -> str:
        """The SHA-256 of names, classes and contents (see `image_check.check`), and of a table and its labels."""
        if not self.table:
            return self._hash(self.sizes, self.class_names, self.digests)
        y = self.labels if self.targets is None else self.targets
        y_digest = hashlib.sha256(np.ascontiguousarray(y).data).hexdigest()
        return self._hash(self.table, self.class_names, self.digests, self.target_names, y_digest)

    def _hash(self, *parts: Json) -> str:
        text = json.dumps([[utf8(file) for file in self.files], *parts])
        return hashlib.sha256(text.encode()).hexdigest()

    def select(self, indices: np.ndarray) -> "FileSource":
        """The source of the examples with these indices, int64[m], in this order."""

        def take(values: Sequence[Value]) -> tuple[Value, ...]:
            return tuple(values[i] for i in indices)

        return replace(
            self, files=take(self.files), sizes=take(self.sizes), digests=take(self.digests),
            labels=None if self.labels is None else self.labels[indices],
            targets=None if self.targets is None else self.targets[indices],
            columns={name: take(values) for name, values in self.columns.items()},
        )  # fmt: skip

    def without(self, bad: Mapping[str, str]) -> "FileSource":
        """The source without these files, which `left_out` then names."""
        kept = self.select(np.array([i for i, file in enumerate(self.files) if file not in bad], np.int64))
        own = sorted(bad.keys() & set(self.files)) if self.table else sorted(bad)
        return replace(kept, left_out=tuple(utf8(str(self.root / file)) for file in own))


def numbers(column: str, values: Sequence[Value], fail: Callable[[int, str], UserError]) -> np.ndarray:
    """Converts a column of a table to f64[n]. Raises `fail(row, message)` for the first value that is not a number.

    In a column of True and False, as pandas writes booleans, these are 1 and 0.
    """
    if set(values) <= {"True", "False"}:
        return np.array([value == "True" for value in values], np.float64)
    out = np.empty(len(values), np.float64)
    for i, value in enumerate(values):
        try:
            out[i] = float(value)
        except (TypeError, ValueError) as e:
            holds = repr(value) if value is not None and str(value).strip() else "nothing"
            raise fail(i, f"the column {column!r} holds {holds}, not a number") from e
    return out


def report_unreadable(kind: str, path: Path, reasons: Mapping[str, str], unreadable: str) -> None:
    """Raises UserError naming the files in {path: reason}, or warns of them if `unreadable` is "skip".

    Writes the full list to the cache folder. `kind` is the source's name in a config, `path` what it reads.
    """
    file = image_check.write_list(f"{printable(path.resolve().name)}-{image_check.identity(path)[:8]}", reasons)
    listed = f"all are listed in {file}" if file else "the cache folder is not writable, so no file lists them"
    if unreadable == "error":
        shown = "; ".join(f"{file} ({reason})" for file, reason in sorted(reasons.items())[:3])
        more = f" and {len(reasons) - 3} more; {listed}" if len(reasons) > 3 else ""
        raise UserError(f"{kind}: unreadable image: {shown}{more}; repair, move or remove it, or skip all such files "
                        "by --config.data.unreadable=skip")  # fmt: skip
    log.warning("%s: unreadable files left out: %d; %s", path, len(reasons), listed)

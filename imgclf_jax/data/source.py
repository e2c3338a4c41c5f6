"""`Source`: random access to the labeled examples of one split, without order or state; and the facts about them."""

import hashlib
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Array, Examples

MAX_CLASSES = 1_000_000

_reading = threading.RLock()  # around every `read`: splits may share a file handle, and its position


@dataclass(frozen=True, eq=False)
class Source:
    """The examples of one split. Raises UserError for fields that fit no data set.

    `read(ids)` maps ids int64[b] in [0, size) to {"image": uint8[b, h, w, c], or a list of bytes, arrays [h, w, c] or
    Pillow images} and, unless `labels` are given, "label" i32[b], in the order of the ids. One thread at a time
    calls it.
    """

    size: int  # the number of examples
    read: Callable[[np.ndarray], Examples]
    class_names: tuple[str, ...]  # or the names of the targets
    fingerprint: str  # changes whenever the examples or their order change
    labels: np.ndarray | None = None  # i32[size], or targets f32[size, k]; None: known only by reading
    example_name: Callable[[int], str] = "example {}".format  # for messages and listings, such as the file
    columns: Mapping[str, Sequence[Any] | np.ndarray] = field(default_factory=dict)  # more values [size] by name
    skipped_files: tuple[str, ...] = ()  # unreadable files that are no examples, sorted
    bits: int = 16  # of encoded grey images of more than 8 bits, which `decode` scales to 8

    def __post_init__(self) -> None:
        names, n = self.class_names, self.size
        if n < 1:
            raise UserError(f"Source(size={n}): must be 1 or more")
        if isinstance(names, str) or {type(name) for name in names} != {str} or len(set(names)) < len(names):
            raise UserError(f"Source(class_names={names!r:.80}): must be a tuple of different strings")
        object.__setattr__(self, "class_names", tuple(names))
        if self.labels is not None:
            labels = np.asarray(self.labels)
            check = _check_labels if labels.ndim < 2 else self._check_targets
            check(labels, n, len(names))
            object.__setattr__(self, "labels", labels.astype(np.int32 if labels.ndim < 2 else np.float32, copy=False))
        for name, values in self.columns.items():
            if len(values) != n:
                raise UserError(f"Source: the column {name!r} has {len(values)} values for {n} examples")

    def _check_targets(self, targets: np.ndarray, n: int, k: int) -> None:
        if targets.shape != (n, k) or targets.dtype.kind not in "fiub":
            raise UserError(f"Source: targets are {targets.dtype}{list(targets.shape)}; expected numbers [{n}, {k}] "
                            f"for {n} examples and {k} class_names")  # fmt: skip
        with np.errstate(over="ignore"):
            wrong = np.argwhere(~np.isfinite(targets.astype(np.float32, copy=False)))
        if wrong.size:
            i, column = map(int, wrong[0])
            more = f" (and {len(wrong) - 1:,} more)" * (len(wrong) > 1)
            raise UserError(f"{self.example_name(i)}: target {column} is {targets[i, column]}{more}; targets must be "
                            "finite float32 numbers")  # fmt: skip

    def listed_name(self, i: int) -> str:
        """The name of an example in files and tables: its file, or else its id alone."""
        return self.example_name(i).removeprefix("example ")

    @property
    def label_key(self) -> str:
        """The name of the labels in a batch: "label" i32[b], or "target" f32[b, k]."""
        return "label" if self.labels is None or self.labels.ndim == 1 else "target"

    @property
    def target_names(self) -> tuple[str, ...]:
        """The names of the k targets; () for a source with labels."""
        return self.class_names if self.label_key == "target" else ()


@dataclass(frozen=True)
class DataInfo:
    """The facts about the data that a trained model needs after the data are gone."""

    train_examples: int
    image_shape: tuple[int, int, int]  # (h, w, c), after the host ops
    class_names: tuple[str, ...]
    fingerprint: str
    class_counts: tuple[int, ...] = ()  # training examples of each class; empty unless the loss needs them
    target_names: tuple[str, ...] = ()  # equal to class_names if examples have targets f32[k]; empty with labels
    sampling: str = ""  # SHA-256 of the weights or ids that data.sampling reads; empty if it reads none
    extra: dict[str, "DataInfo"] = field(default_factory=dict)  # the further streams of `data.extra`, by name
    bits: int = 16  # of encoded grey images of more than 8 bits: see `Source`


def _check_labels(labels: np.ndarray, n: int, classes: int) -> None:
    """Raises UserError unless there is one integer label per example, from 0 to the number of classes - 1."""
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"Source: labels are {labels.dtype}{list(labels.shape)} for {n} examples; expected whole "
                        f"numbers [{n}]")  # fmt: skip
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(f"Source: labels are from {labels.min()} to {labels.max()} for {classes} class_names; number "
                        f"the classes from 0 to {classes - 1}")  # fmt: skip


def read_examples(source: Source, ids: np.ndarray) -> Examples:
    """Reads {"image": …, "label": i32[n]} for ids int64[n], or "target" f32[n, k] for "label".

    Raises UserError unless `source.read` returns one image per id and, if its labels are unknown, one label.
    """
    with _reading:
        examples = source.read(ids)
    needed = ["image"] if source.labels is not None else ["image", "label"]
    if not isinstance(examples, Mapping) or not set(needed) <= set(examples):
        holds = sorted(examples) if isinstance(examples, Mapping) else examples
        raise UserError(f"the source's read returns {holds!r:.80}; return a dict with {' and '.join(needed)}")
    if (images := len(examples["image"])) != len(ids):
        raise UserError(f"the source's read returns {images} images for {len(ids)} ids; return one per id, in their "
                        "order")  # fmt: skip
    if source.labels is not None:
        return {"image": examples["image"], source.label_key: source.labels[ids]}
    labels = np.asarray(examples["label"])
    _check_labels(labels, len(ids), len(source.class_names))
    return {"image": examples["image"], "label": labels.astype(np.int32, copy=False)}


def concatenate(parts: Sequence[tuple[Source, int, int]]) -> Source:
    """The examples start to stop (exclusive) of each (source, start, stop) as one source.

    Raises UserError unless all have the same classes, and the same kind of labels.
    """
    first = parts[0][0]
    if len({source.label_key for source, _, _ in parts}) > 1:
        raise UserError("it joins splits with labels and splits with targets")
    if any(source.class_names != first.class_names for source, _, _ in parts):  # a label would mean another class
        raise UserError("it joins splits with different class_names; give all splits the same ones")
    starts = np.cumsum([0] + [stop - start for _, start, stop in parts])

    def name(i: int) -> str:
        p = int(np.searchsorted(starts, i, side="right")) - 1
        source, start, _ = parts[p]
        return source.example_name(int(i - starts[p] + start))

    def read(ids: np.ndarray) -> Examples:
        which = np.searchsorted(starts, ids, side="right") - 1
        images: list[Array] = [None] * len(ids)
        labels = np.zeros(len(ids), np.int32)
        for p, (source, start, _) in enumerate(parts):
            rows = np.flatnonzero(which == p)
            if rows.size:
                examples = read_examples(source, ids[rows] - starts[p] + start)
                labels[rows] = examples.get("label", 0)  # targets are known
                for row, image in zip(rows, examples["image"], strict=True):
                    images[row] = image
        return {"image": images, "label": labels}

    prints = [(source.fingerprint, start, stop) for source, start, stop in parts]
    known = [source.labels[start:stop] for source, start, stop in parts if source.labels is not None]
    shared = set.intersection(*(set(source.columns) for source, _, _ in parts))
    return Source(
        int(starts[-1]), read, first.class_names, hashlib.sha256(repr(prints).encode()).hexdigest(),
        np.concatenate(known) if len(known) == len(parts) else None, name,
        {key: np.concatenate([np.asarray(source.columns[key])[start:stop] for source, start, stop in parts])
         for key in sorted(shared)},
        tuple(sorted({file for source, _, _ in parts for file in source.skipped_files})), first.bits,
    )  # fmt: skip


def read_labels(source: Source) -> np.ndarray:
    """The labels i32[n]: the known ones, or those of one pass over the examples. Raises UserError for targets."""
    if source.target_names:
        raise UserError("data.source has targets, not labels")
    if source.labels is not None:
        return source.labels
    chunks = (np.array(ids, np.int64) for ids in itertools.batched(range(source.size), 1000))
    return np.concatenate([read_examples(source, ids)["label"] for ids in chunks])


def to_numbers(column: str, values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Converts the values of a column to f64[n]; True and False, as pandas writes booleans, are 1 and 0."""
    if all(value in ("True", "False") for value in values):
        return np.array([value == "True" for value in values], np.float64)
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as e:
        raise UserError(f"the column {column!r} does not hold numbers: {e}") from e

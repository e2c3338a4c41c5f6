"""Sources: random access to examples, without order or state.

A source is any object with `len(source)`, `source.read(ids)`, `source.class_names` and `source.fingerprint()`. A source
spec names a function that returns `{base split: source}`; the TFDS split syntax works on all of them.
"""

import contextlib
import functools
import hashlib
import itertools
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax.core import processes, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Array, Examples, Function, Value
from imgclf_jax.data import decode, splits
from imgclf_jax.data.arrays import MOST_CLASSES, ArraySource, arrays
from imgclf_jax.data.folder import folder
from imgclf_jax.data.prepare import TfdsSource, open_tfds
from imgclf_jax.data.table import table

_reading = threading.RLock()  # around `read` of sources that are not thread-safe; one, as splits may share a file


class Source(Protocol):
    """The interface of a source. One with k targets also has their `target_names`, which are its class names too.

    The stream reads ahead in several threads. It calls `read` in one at a time, unless the source is `thread_safe`.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def read(self, ids: np.ndarray) -> Examples:
        """Reads the examples with these ids, int64[n] in [0, len), in their order."""

    def fingerprint(self) -> str:
        """A hex digest that changes with the examples or their order."""


@dataclass(frozen=True)
class FakeSource:
    """Synthetic images: noise hashed from example and pixel, with a bright band at a height given by the class."""

    n: int
    shape: tuple[int, ...]
    class_names: tuple[str, ...]
    offset: int
    thread_safe: ClassVar[bool] = True

    def __len__(self) -> int:
        return self.n

    def read(self, ids: np.ndarray) -> Examples:
        labels = (ids % len(self.class_names)).astype(np.int32)  # [n]
        size = int(np.prod(self.shape))
        first = (ids.astype(np.uint64)[:, None] + np.uint64(self.offset)) * np.uint64(size)
        x: np.ndarray = (first + np.arange(size, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)  # wraps modulo 2**64
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        noise = (x >> np.uint64(57)).astype(np.uint8)  # [n, h * w * c], 0 to 127
        band = np.arange(size) * len(self.class_names) // size == labels[:, None]
        return {"image": (noise + np.uint8(128) * band).reshape(-1, *self.shape), "label": labels}

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


@dataclass(frozen=True)
class SplitSource:
    """Concatenated parts of base splits as one source."""

    parts: tuple[tuple[Source, int, int], ...]  # (source, start, stop)
    thread_safe: ClassVar[bool] = True  # it reads its parts by `read_examples`

    @property
    def immutable(self) -> bool:
        return all(getattr(source, "immutable", False) for source, _, _ in self.parts)

    @property
    def stamp(self) -> str:
        return " ".join(getattr(source, "stamp", "") for source, _, _ in self.parts)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        return np.cumsum([0] + [stop - start for _, start, stop in self.parts])

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.parts[0][0].class_names

    @property
    def target_names(self) -> tuple[str, ...]:
        return target_names(self.parts[0][0])

    @property
    def labels(self) -> np.ndarray | None:
        return known_labels(self)

    @property
    def targets(self) -> np.ndarray | None:
        return self._join("targets", np.concatenate)

    @property
    def weights(self) -> np.ndarray | None:
        return self._join("weights", np.concatenate)

    @property
    def files(self) -> tuple[str, ...] | None:
        return self._join("files", lambda parts: tuple(itertools.chain(*parts)))

    def _join(self, name: str, concatenate: Callable[[list[Any]], Any]) -> Any:
        """An attribute with a value per example; None if a part lacks it."""
        found = [(getattr(source, name, None), start, stop) for source, start, stop in self.parts]
        parts = [values[start:stop] for values, start, stop in found if values is not None]
        return concatenate(parts) if len(parts) == len(found) else None

    def column(self, name: str = "") -> np.ndarray:
        return read_column(self, name)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, ids: np.ndarray) -> Examples:
        if len(self.parts) == 1:
            source, start, _ = self.parts[0]
            return read_examples(source, ids + start)
        which = np.searchsorted(self.starts, ids, side="right") - 1
        images: list[Array] = [None] * len(ids)
        name, k = ("target", (len(self.target_names),)) if self.target_names else ("label", ())
        y = np.zeros((len(ids), *k), np.float32 if k else np.int32)
        for p, (source, start, _) in enumerate(self.parts):
            rows = np.flatnonzero(which == p)
            if rows.size:
                examples = read_examples(source, ids[rows] - self.starts[p] + start)
                y[rows] = examples[name]
                for row, image in zip(rows, examples["image"], strict=True):
                    images[row] = image
        return {"image": images, name: y}

    def name(self, i: int) -> str:
        p = int(np.searchsorted(self.starts, i, side="right")) - 1
        source, start, _ = self.parts[p]
        return example_name(source, int(i - self.starts[p] + start))

    def fingerprint(self) -> str:
        parts = [(source.fingerprint(), start, stop) for source, start, stop in self.parts]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def read_examples(source: Source, ids: np.ndarray) -> Examples:
    """Reads the examples with these ids, int64[n], in one thread at a time unless the source is `thread_safe`.

    Raises UserError unless there is one image per id, with its label or targets.
    """
    with contextlib.nullcontext() if getattr(source, "thread_safe", False) else _reading:
        examples = source.read(ids)
    check_y(source, examples)
    if (images := len(examples["image"])) != len(ids):
        raise UserError(f"{type(source).__name__}.read returns {images} images for {len(ids)} ids; return one per id, "
                        "in their order")  # fmt: skip
    return examples


def example_name(source: Source, i: int, unnamed: Callable[[int], str] = "example {}".format) -> str:
    """The name of an example: what the method `name` of its source returns, such as its file, or else `unnamed(i)`."""
    name = getattr(source, "name", None)
    return str(name(i)) if callable(name) else unnamed(i)


def target_names(source: Source) -> tuple[str, ...]:
    """The names of a source's k targets f32[n, k]; () for a source with labels."""
    return tuple(getattr(source, "target_names", ()))


def check_y(source: Source, examples: Examples) -> None:
    """Raises UserError unless the examples have labels, or the targets that the source names."""
    kind = type(source).__name__
    if not isinstance(examples, Mapping):
        raise UserError(
            f"{kind}.read returns a {type(examples).__name__}; return a dict of arrays, 'image' and 'label'"
        )
    names, keys = target_names(source), [name for name in ("label", "target") if name in examples]
    if len(keys) != 1:
        raise UserError(f"{kind}.read returns {' and '.join(keys) or 'neither label nor target'}; return either "
                        "'label' i32[n] or 'target' f32[n, k]")  # fmt: skip
    if keys == ["label"] and names:
        raise UserError(f"{kind} has target_names, but its read returns 'label'; return 'target' f32[n, k]")
    if keys == ["target"] and (not names or tuple(source.class_names) != names):
        raise UserError(f"{kind}.read returns 'target', so {kind} needs target_names, a name per target, and "
                        "class_names equal to them")  # fmt: skip
    if not names:
        labels = np.asarray(examples["label"])
        _check_labels(f"{kind}.read returns", "label", labels, len(examples["image"]), len(source.class_names))
    if names and np.shape(examples["target"]) != (len(examples["image"]), len(names)):
        raise UserError(f"{kind}.read returns 'target' {list(np.shape(examples['target']))} for "
                        f"{len(examples['image'])} images and {len(names)} target_names; return "
                        f"[{len(examples['image'])}, {len(names)}]")  # fmt: skip


def _check_labels(has: str, name: str, labels: np.ndarray, images: int, classes: int) -> None:
    """Raises UserError unless there is one integer label per image, from 0 to the number of classes - 1.

    The message begins with `has`, such as "Stripes.read returns", and calls the array `name`.
    """
    if labels.shape != (images,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{has} {name!r} {labels.dtype}{list(labels.shape)} for {images} images; return integers "
                        f"[{images}]")  # fmt: skip
    if images and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(f"{has} labels from {labels.min()} to {labels.max()} for {classes} class_names; number the "
                        f"classes from 0 to {classes - 1}")  # fmt: skip


def digits() -> dict[str, Source]:
    """scikit-learn's 1,797 handwritten digits, uint8[8, 8, 1]; 360 of them, stratified by class, are `test`.

    They are the test set of Alpaydin and Kaynak 1998 (UCI, CC BY 4.0), with levels from 0 to 16. The copy in
    `digits.npz` saves each start importing scikit-learn, and is split by its `train_test_split` with `random_state=0`.
    """
    names = tuple("0123456789")
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        return {
            split: ArraySource(
                np.round(file[f"{split}_images"] * (255 / 16)).astype(np.uint8)[..., None],  # [n, 8, 8, 1]
                file[f"{split}_labels"].astype(np.int32),
                names,
            )
            for split in ("train", "test")
        }


def fake(n: int = 1024, shape: tuple[int, int, int] = (28, 28, 1), classes: int = 10) -> dict[str, Source]:
    """Synthetic examples for tests and timings: n each in `train` and `test`.

    Raises UserError for impossible numbers, and for images larger than 16 MiB.
    """

    def in_range(value: Value, most: int) -> bool:
        return type(value) is int and 1 <= value <= most

    if not in_range(n, 2**48):
        raise UserError(f"fake(n={n!r}): n must be a whole number from 1 to 2**48")
    sized = isinstance(shape, (tuple, list)) and len(shape) == 3 and all(in_range(size, 2**24) for size in shape)
    if not sized or shape[2] > 4 or math.prod(shape) > 2**24:
        raise UserError(f"fake(shape={shape!r}): shape must be (height, width, channels), such as (28, 28, 1), with 1 "
                        "to 4 channels and at most 2**24 values")  # fmt: skip
    if not in_range(classes, MOST_CLASSES):
        raise UserError(f"fake(classes={classes!r}): classes must be a whole number from 1 to {MOST_CLASSES:,}")
    names = tuple(str(c) for c in range(classes))
    return {"train": FakeSource(n, tuple(shape), names, 0), "test": FakeSource(n, tuple(shape), names, n)}


def tfds(name: str, data_dir: str = "", manual_dir: str = "") -> dict[str, TfdsSource]:
    """A TFDS data set by name ('mnist', 'imagenet2012:5.1.0'), prepared as ArrayRecord at first use.

    `manual_dir` holds manually downloaded archives, for machines without a network.
    """
    if re.search(r":(?!\d)", name):  # not a version, as in imagenet2012:5.1.0
        spec.check_trusted(f"data set {name!r}, for which TFDS would fetch a program and run it")
    return open_tfds(name, data_dir, manual_dir)


SOURCES: dict[str, Function] = {"digits": digits, "tfds": tfds, "folder": folder, "table": table, "arrays": arrays,
                                "fake": fake}  # fmt: skip


def open_splits(
    text: str, data_dir: str = "", manual_dir: str = "", unreadable: str = "error",
    formats: tuple[str, ...] = decode.FORMATS,
) -> dict[str, Source]:  # fmt: skip
    """Opens the base splits of the source that a spec names. Raises UserError if the data are missing."""
    try:
        call = spec.parse_one(text)
        make = spec.bind(call, SOURCES, "source")
    except UserError as e:
        if text in SOURCES or not re.fullmatch(r"[\w./~-]+", text):
            raise
        raise UserError(f"data.source={text!r}: {e}; for a folder of images write folder({text!r}), for a data set of "
                        f"TensorFlow Datasets tfds({text!r})") from e  # fmt: skip
    if make.func is tfds:
        make = functools.partial(make, **{"data_dir": data_dir, "manual_dir": manual_dir} | make.keywords)
    elif make.func in (folder, table):
        make = functools.partial(make, **{"unreadable": unreadable, "formats": formats} | make.keywords)
    try:
        opened = make()
        if ":" in call.name:
            _check_splits(f"data.source={text!r}", opened)
        return opened
    except (TypeError, AttributeError) as e:
        if ":" in call.name:
            raise  # the user needs the traceback into their own source
        raise UserError(f"data.source={text!r} fails: {e}; check the types of its arguments") from e


def _check_splits(where: str, opened: Any) -> None:
    """Raises UserError unless what a source of the user's returns is a dict of sources by split."""
    if not isinstance(opened, Mapping) or not opened:
        raise UserError(
            f"{where} returns a {type(opened).__name__}; return a dict, {{'train': source, 'test': source}}"
        )
    for split, source in opened.items():
        kind = f"{where}: the split {split!r} is a {type(source).__name__}"
        if lacking := [name for name in ("__len__", "read", "class_names", "fingerprint") if not hasattr(source, name)]:
            raise UserError(f"{kind} without {lacking[0]}; a source has __len__, read, class_names and fingerprint")
        length, names, fingerprint = source.__len__(), source.class_names, source.fingerprint()
        if not isinstance(length, int | np.integer) or length < 1:
            raise UserError(f"{kind} of {length!r} examples; its __len__ must return 1 or more")
        if not isinstance(names, list | tuple) or not all(type(name) is str for name in names):
            raise UserError(f"{kind} whose class_names are {names!r:.80}; they must be a tuple of strings")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"{kind} whose class_names have {twice[0]!r} twice; give each class its own name")
        if not isinstance(fingerprint, str):
            raise UserError(f"{kind} whose fingerprint() is {fingerprint!r:.80}; it must be a string")


def open_data(config: ConfigDict, text: str = "") -> dict[str, Source]:
    """Opens `data.source`, or the source spec `text`, with the other keys of the config: see `open_splits`.

    One process per host goes first, so the others reuse what it prepares, downloads or scans.
    """
    data, ops = config.data, [config.preprocess, config.preprocess_eval or config.preprocess]
    with contextlib.suppress(UserError):  # ops that evaluation refuses
        ops[1] = decode.evaluation_spec(config.preprocess_eval, config.preprocess)
    ops = [text for text in dict.fromkeys(ops) if text.strip()]
    formats = tuple(dict.fromkeys(name for text in ops for name in decode.formats_of(text)))
    arguments = text or data.source, data.data_dir, data.manual_dir, data.unreadable, formats
    opened: dict[str, Source] = processes.once_a_host(lambda: open_splits(*arguments))
    processes.agree(lambda: {f"the data of split {name}": source.fingerprint()[:12]
                                               for name, source in opened.items()},
                    fix="all processes must read the same data: see data.source and data.data_dir")  # fmt: skip
    return opened


def describe_use(base: dict[str, Source], data: ConfigDict, extra: Mapping[str, str] = MappingProxyType({})) -> str:
    """Describes in one line the use of each split, and the unused examples of these base splits.

    `extra` are the splits of further streams by name, "" for `train` or the only one.
    """
    default = "train" if len(base) > 1 else next(iter(base))
    streams = {name: split or default for name, split in extra.items()}
    return splits.describe(data.train, data.eval, {name: len(source) for name, source in base.items()}, streams)


def left_out(base: dict[str, Source]) -> list[str]:
    """The unreadable files that these base splits skip, sorted."""
    return sorted({file for source in base.values() for file in getattr(source, "left_out", ())})


def take_split(base: dict[str, Source], text: str) -> Source:
    """The source of a split such as `train[:90%]+extra`."""
    parts = splits.resolve(text, {name: len(source) for name, source in base.items()})
    if len(parts) == 1 and (parts[0].start, parts[0].stop) == (0, len(base[parts[0].name])):
        return base[parts[0].name]
    if len({target_names(base[part.name]) for part in parts}) > 1:
        raise UserError(f"split {text!r} joins splits with different targets, or labels with targets")
    if len({tuple(base[part.name].class_names) for part in parts}) > 1:  # a label would mean another class
        raise UserError(f"split {text!r} joins splits with different class_names; give all splits the same ones")
    return SplitSource(tuple((base[p.name], p.start, p.stop) for p in parts))


def class_counts(source: Source) -> np.ndarray:
    """The number of examples per class, int64[classes]: see `read_labels`. Raises UserError for targets."""
    if target_names(source):
        raise UserError("the loss weights classes by their number of examples, but data.source has targets, not "
                        "labels; use another loss")  # fmt: skip
    return np.bincount(read_labels(source), minlength=len(source.class_names))


def _parts(source: Source) -> tuple[tuple[Source, int, int], ...]:
    return source.parts if isinstance(source, SplitSource) else ((source, 0, len(source)),)


def _labels_of(source: Source) -> np.ndarray | None:
    """The attribute `labels` i32[n] of a base source; None without it, and for targets.

    Raises UserError unless it has one per example, as `read` would return them.
    """
    labels, has = getattr(source, "labels", None), f"{type(source).__name__} has"
    if labels is None or target_names(source):
        return None
    labels = np.asarray(labels)
    if labels.shape != (len(source),):
        raise UserError(f"{has} labels {list(labels.shape)} for {len(source)} examples; it must have one per example")
    _check_labels(has, "labels", labels, len(source), len(source.class_names))
    return labels.astype(np.int32, copy=False)


def known_labels(source: Source) -> np.ndarray | None:
    """The labels i32[n] of a source with the attribute `labels`, without reading an image; else None."""
    found = [(_labels_of(part), start, stop) for part, start, stop in _parts(source)]
    parts = [labels[start:stop] for labels, start, stop in found if labels is not None]
    return np.concatenate(parts) if len(parts) == len(found) else None


def read_labels(source: Source) -> np.ndarray:
    """The labels i32[n]: the source's `labels`, or those of one pass over its examples."""
    if (labels := known_labels(source)) is not None:
        return labels
    chunks = (np.array(ids, np.int64) for ids in itertools.batched(range(len(source)), 1000))
    return np.concatenate([np.asarray(read_examples(source, ids)["label"], np.int32) for ids in chunks])


def read_column(source: Source, name: str = "") -> np.ndarray:
    """A number per example, [n]: the source's `column(name)`, or its `weights` for the name "".

    Raises UserError for a source without them.
    """
    chunks = []
    for part, start, stop in _parts(source):
        column, weights = getattr(part, "column", None), getattr(part, "weights", None)
        if column is None and (name or weights is None):
            missing = f"no column {name!r}" if name else "no weights"
            raise UserError(f"data.source has {missing}; name a file of numbers, such as 'weights.npy', or use "
                            "table('labels.csv') with a column of numbers")  # fmt: skip
        values = np.asarray(weights if column is None else column(name))
        if values.shape != (len(part),):
            raise UserError(f"data.source has weights {list(values.shape)} for {len(part)} examples; it must have one "
                            "per example")  # fmt: skip
        chunks.append(values[start:stop])
    return np.concatenate(chunks)

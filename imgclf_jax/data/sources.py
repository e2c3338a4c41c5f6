"""Sources: random access to examples, with no order and no state of their own.

A source is any object with `len(source)`, `source.read(ids)`, `source.class_names` and `source.fingerprint()`. A
source spec names a function that gives `{base split name: source}`; TFDS's split syntax then works on all of them.
"""

import contextlib
import functools
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax.core import processes, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode, splits
from imgclf_jax.data.arrays import MOST_CLASSES, ArraySource, arrays
from imgclf_jax.data.folder import folder
from imgclf_jax.data.table import table

# {"image": uint8[n, h, w, c] or a list of bytes or arrays, "label": i32[n]}, or "target": f32[n, k] in place of "label"
Examples = dict[str, Any]


class Source(Protocol):
    """What the stream asks of a source.

    One with targets has `target_names` too, k of them, which are also its class names; see `target_names`.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def read(self, ids: np.ndarray) -> Examples:
        """The examples with these ids, int64[n] in [0, len), in their order, in one call."""

    def fingerprint(self) -> str:
        """A hex digest that changes when the examples or their order do."""


@dataclass(frozen=True)
class FakeSource:
    """Made-up images. A pixel is a hash of its example and place; a bright band lies higher or lower by the class."""

    n: int
    shape: tuple[int, ...]
    class_names: tuple[str, ...]
    offset: int

    def __len__(self) -> int:
        return self.n

    def read(self, ids: np.ndarray) -> Examples:
        labels = (ids % len(self.class_names)).astype(np.int32)  # [n]
        size = int(np.prod(self.shape))
        place = (ids.astype(np.uint64)[:, None] + np.uint64(self.offset)) * np.uint64(size)
        x: np.ndarray = (place + np.arange(size, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)  # wraps modulo 2**64
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        noise = (x >> np.uint64(57)).astype(np.uint8)  # [n, h * w * c], 0 to 127
        band = np.arange(size) * len(self.class_names) // size == labels[:, None]
        return {"image": (noise + np.uint8(128) * band).reshape(-1, *self.shape), "label": labels}

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


@dataclass(frozen=True)
class TfdsSource:
    """A TFDS split prepared as ArrayRecord: encoded images, read by id. Opened when it is first read."""

    open: Callable[[], Any]
    examples: int
    class_names: tuple[str, ...]
    identity: str
    stamp: str = ""  # of the prepared files
    immutable: ClassVar[bool] = True  # the identity changes with the version and the number of bytes, the stamp always

    def __len__(self) -> int:
        return self.examples

    @functools.cached_property
    def data_source(self) -> Any:
        return self.open()

    def read(self, ids: np.ndarray) -> Examples:
        records = self.data_source.__getitems__(ids.tolist())
        labels = np.array([r["label"] for r in records], np.int32)
        if labels.min() < 0:  # TFDS writes -1 where the labels of a test set are secret
            raise UserError(f"example {int(ids[labels.argmin()])} of {self.identity!r} has no label; use another split")
        return {"image": [r["image"] for r in records], "label": labels}

    def fingerprint(self) -> str:
        return hashlib.sha256(self.identity.encode()).hexdigest()


@dataclass(frozen=True)
class SplitSource:
    """Some parts of base splits, one after the other, as one source."""

    parts: tuple[tuple[Source, int, int], ...]  # (source, start, stop)

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
    def targets(self) -> np.ndarray | None:
        own = [getattr(source, "targets", None) for source, _, _ in self.parts]
        parts = [y[start:stop] for y, (_, start, stop) in zip(own, self.parts, strict=True) if y is not None]
        return np.concatenate(parts) if parts and len(parts) == len(own) else None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, ids: np.ndarray) -> Examples:
        if len(self.parts) == 1:
            source, start, _ = self.parts[0]
            return source.read(ids + start)
        which = np.searchsorted(self.starts, ids, side="right") - 1
        images: list[Any] = [None] * len(ids)
        name, k = ("target", (len(self.target_names),)) if self.target_names else ("label", ())
        y = np.zeros((len(ids), *k), np.float32 if k else np.int32)
        for p, (source, start, _) in enumerate(self.parts):
            places = np.flatnonzero(which == p)
            if places.size:
                examples = source.read(ids[places] - self.starts[p] + start)
                y[places] = check_y(source, examples)[name]
                for place, image in zip(places, examples["image"], strict=True):
                    images[place] = image
        return {"image": images, name: y}

    def name(self, i: int) -> str:
        """What an example is called in error messages: its file, where there is one."""
        p = int(np.searchsorted(self.starts, i, side="right")) - 1
        source, start, _ = self.parts[p]
        return getattr(source, "name", "example {}".format)(int(i - self.starts[p] + start))

    def fingerprint(self) -> str:
        return self._over(lambda source: source.fingerprint())

    def listing_fingerprint(self) -> str:
        """That of older versions; "" if it is not another one."""
        older = self._over(lambda source: listing_fingerprint(source) or source.fingerprint())
        return older if older != self.fingerprint() else ""

    def _over(self, fingerprint: Callable[[Source], str]) -> str:
        whole = [(fingerprint(source), start, stop) for source, start, stop in self.parts]
        return hashlib.sha256(repr(whole).encode()).hexdigest()


def listing_fingerprint(source: Source) -> str:
    """The fingerprint without contents that older versions recorded of such a source; "" if there was none such."""
    older = getattr(source, "listing_fingerprint", None)
    return older() if older else ""


def target_names(source: Source) -> tuple[str, ...]:
    """The names of the k targets that a source reads, f32[n, k]; () of a source with labels."""
    return tuple(getattr(source, "target_names", ()))


def check_y(source: Source, examples: Examples) -> Examples:
    """The examples that a source read. Raises UserError unless they have labels, or the targets that it names."""
    names, given = target_names(source), [name for name in ("label", "target") if name in examples]
    what = type(source).__name__
    if len(given) != 1:
        raise UserError(f"{what}.read gives {' and '.join(given) or 'neither label nor target'}; a source gives either "
                        "'label' i32[n] or 'target' f32[n, k]")  # fmt: skip
    if given == ["label"] and names:
        raise UserError(f"{what} has target_names, and its read gives 'label'; it must give 'target' f32[n, k]")
    if given == ["target"] and (not names or tuple(source.class_names) != names):
        raise UserError(f"{what}.read gives 'target', so {what} needs target_names, a name for each of the k targets, "
                        "and class_names equal to them")  # fmt: skip
    if names and np.shape(examples["target"]) != (len(examples["image"]), len(names)):
        raise UserError(f"{what}.read gives 'target' {list(np.shape(examples['target']))} for "
                        f"{len(examples['image'])} images and {len(names)} target_names")  # fmt: skip
    return examples


def digits() -> dict[str, Source]:
    """scikit-learn's 1,797 handwritten digits, uint8[8, 8, 1]; 360 of them, stratified by class, are `test`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]  # [1797, 8, 8, 1]
    labels = data.target.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    names = tuple(str(n) for n in data.target_names)
    return {
        "train": ArraySource(images[train], labels[train], names),
        "test": ArraySource(images[test], labels[test], names),
    }


def fake(n: int = 1024, shape: tuple[int, int, int] = (28, 28, 1), classes: int = 10) -> dict[str, Source]:
    """Made-up examples for tests and timings: `train` and `test`, n of each.

    Raises UserError for numbers that no examples can have, or of which an image would be larger than 16 MiB.
    """

    def whole(value: Any, most: int) -> bool:
        return type(value) is int and 1 <= value <= most

    if not whole(n, 2**48):
        raise UserError(f"fake(n={n!r}): n is a whole number from 1 to 2**48")
    sized = isinstance(shape, (tuple, list)) and len(shape) == 3 and all(whole(size, 2**24) for size in shape)
    if not sized or shape[2] > 4 or math.prod(shape) > 2**24:
        raise UserError(f"fake(shape={shape!r}): shape is (height, width, channels), such as (28, 28, 1), with 1 to 4 "
                        "channels and at most 2**24 numbers in all")  # fmt: skip
    if not whole(classes, MOST_CLASSES):
        raise UserError(f"fake(classes={classes!r}): classes is a whole number from 1 to {MOST_CLASSES:,}")
    names = tuple(str(c) for c in range(classes))
    return {"train": FakeSource(n, tuple(shape), names, 0), "test": FakeSource(n, tuple(shape), names, n)}


def tfds(name: str, data_dir: str = "", manual_dir: str = "") -> dict[str, Source]:
    """A TensorFlow data set by its TFDS name ('mnist', 'imagenet2012:5.1.0'), prepared as ArrayRecord at first use.

    `manual_dir` holds the original files, for machines without a network.
    """
    if re.search(r":(?!\d)", name):  # and not a version, as in imagenet2012:5.1.0
        spec.check_trusted(f"data set {name!r}, for which TFDS would fetch a program and run it")
    from imgclf_jax.data.prepare import open_tfds

    prepared = open_tfds(name, data_dir, manual_dir)
    return {
        split: TfdsSource(
            functools.partial(prepared.data_source, split), examples, prepared.class_names, identity, prepared.stamp
        )
        for split, (examples, identity) in prepared.splits.items()
    }


SOURCES = {"digits": digits, "tfds": tfds, "folder": folder, "table": table, "arrays": arrays, "fake": fake}


def open_splits(
    text: str,
    data_dir: str = "",
    manual_dir: str = "",
    unreadable: str = "error",
    formats: tuple[str, ...] = decode.FORMATS,
    host_ops: tuple[str, ...] = (),
) -> dict[str, Source]:
    """The base splits of the source that a spec names; raises UserError if the data are not there."""
    call = spec.parse_one(text)
    make = spec.bind(call, SOURCES, "source")
    if make.func is tfds:
        make = functools.partial(make, **{"data_dir": data_dir, "manual_dir": manual_dir} | make.keywords)
    elif make.func in (folder, table):
        given = {"unreadable": unreadable, "formats": formats, "host_ops": host_ops}
        make = functools.partial(make, **given | make.keywords)
    try:
        return make()
    except (TypeError, AttributeError) as e:
        if ":" in call.name:
            raise  # the user's own source: the traceback shows where
        raise UserError(f"data.source={text!r} fails: {e}; are its arguments of the right type?") from e


def open_data(config: ConfigDict, text: str = "") -> dict[str, Source]:
    """`open_splits` of `data.source`, or of another source spec, as the config's other keys say.

    Of several processes one a host does it first: what it prepares, downloads or scans, the others find.
    """
    data, ops = config.data, [config.preprocess, config.preprocess_eval or config.preprocess]
    with contextlib.suppress(UserError):  # ops that evaluation refuses
        ops[1] = decode.for_evaluation(config.preprocess_eval, config.preprocess)
    ops = [text for text in dict.fromkeys(ops) if text.strip()]
    formats = tuple(dict.fromkeys(name for text in ops for name in decode.formats_of(text)))
    where = text or data.source, data.data_dir, data.manual_dir, data.unreadable, formats, tuple(ops)
    opened: dict[str, Source] = processes.once_a_host("opening the data", lambda: open_splits(*where))
    processes.agree("comparing data", lambda: {f"the data of split {name}": source.fingerprint()[:12]
                                               for name, source in opened.items()},
                    fix="all processes must read the same data: see data.source and data.data_dir")  # fmt: skip
    return opened


def describe_use(base: dict[str, Source], data: ConfigDict) -> str:
    """A line that says which split serves what, and what of these base splits serves nothing."""
    return splits.describe(data.train, data.eval, {name: len(source) for name, source in base.items()})


def left_out(base: dict[str, Source]) -> list[str]:
    """The files of these base splits that are left out since they cannot be read; sorted."""
    return sorted({file for source in base.values() for file in getattr(source, "left_out", ())})


def take_split(base: dict[str, Source], text: str) -> Source:
    """The examples of a split such as `train[:90%]+extra`."""
    parts = splits.resolve(text, {name: len(source) for name, source in base.items()})
    if len(parts) == 1 and (parts[0].start, parts[0].stop) == (0, len(base[parts[0].name])):
        return base[parts[0].name]
    if len({target_names(base[part.name]) for part in parts}) > 1:
        raise UserError(f"split {text!r} joins splits with different targets, or labels with targets")
    return SplitSource(tuple((base[p.name], p.start, p.stop) for p in parts))


def class_counts(source: Source) -> np.ndarray:
    """How many examples each class has, int64[classes]: from the source's `labels`, else by reading all of it once.

    Raises UserError for a source with targets, which belongs to no class.
    """
    if target_names(source):
        raise UserError("the loss weights classes by their number of examples, and data.source gives targets, not "
                        "labels; use another loss")  # fmt: skip
    return np.bincount(read_labels(source), minlength=len(source.class_names))


def _parts(source: Source) -> tuple[tuple[Source, int, int], ...]:
    return source.parts if isinstance(source, SplitSource) else ((source, 0, len(source)),)


def labels_at_hand(source: Source) -> np.ndarray | None:
    """The labels i32[n] of a source that has the attribute `labels`, so that no image is read; else None."""
    found = [(getattr(part, "labels", None), start, stop) for part, start, stop in _parts(source)]
    parts = [labels[start:stop] for labels, start, stop in found if labels is not None]
    return np.concatenate(parts) if len(parts) == len(found) else None


def read_labels(source: Source) -> np.ndarray:
    """The labels i32[n]: the source's `labels`, else those of one pass over all of its examples."""
    found = []
    for part, start, stop in _parts(source):
        labels = getattr(part, "labels", None)
        if labels is not None:
            found.append(labels[start:stop])
            continue
        for first in range(start, stop, 1000):
            ids = np.arange(first, min(first + 1000, stop), dtype=np.int64)
            found.append(np.asarray(part.read(ids)["label"], np.int32))
    return np.concatenate(found)


def read_column(source: Source, name: str = "") -> np.ndarray:
    """A number for each example, [n]: what the source's `column(name)` gives, or its `weights` for the name "".

    Raises UserError for a source without them.
    """
    found = []
    for part, start, stop in _parts(source):
        column, weights = getattr(part, "column", None), getattr(part, "weights", None)
        if column is None and (name or weights is None):
            what = f"no column {name!r}" if name else "no weights"
            raise UserError(f"data.source has {what}; name a file of numbers, such as 'weights.npy', or use "
                            "table('labels.csv'), whose columns are numbers")  # fmt: skip
        values = np.asarray(weights if column is None else column(name))
        if values.shape != (len(part),):
            raise UserError(f"data.source has {list(values.shape)} weights for its {len(part)} examples")
        found.append(values[start:stop])
    return np.concatenate(found)

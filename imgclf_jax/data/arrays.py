"""Examples in memory, and the .npz files that hold them.

Files are untrusted: their claimed sizes are checked against the file before memory is allocated.
"""

import hashlib
import io
import math
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from imgclf_jax.core import cache, memory, places
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.once import once
from imgclf_jax.core.typing import Examples

MOST_CLASSES = 1_000_000
_UNNAMED_CLASSES = 1000  # up to which classes need neither names nor an example each
_HEADER = 12_000  # bytes; NumPy itself refuses a longer array header


@dataclass(frozen=True)
class ArraySource:
    """Examples in memory: images uint8[n, h, w, c] with either labels i32[n] or targets f32[n, k]."""

    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...]  # or the names of the targets
    targets: np.ndarray | None = None
    weights: np.ndarray | None = None  # real numbers [n], for data.sampling='weighted'
    thread_safe: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.images)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The names of the k targets; () with labels."""
        return () if self.targets is None else self.class_names

    def read(self, ids: np.ndarray) -> Examples:
        """The examples with these ids, in their order."""
        ys = {"label": self.labels, "target": self.targets}
        return {"image": self.images[ids], **{name: y[ids] for name, y in ys.items() if y is not None}}

    def fingerprint(self) -> str:
        """The SHA-256 of all images, labels or targets, and their names."""
        return self._fingerprint

    @once
    def _fingerprint(self) -> str:
        kind = () if self.targets is None else ("targets",)
        digest = hashlib.sha256(str((self.images.shape, self.class_names, *kind)).encode())
        for array in (self.images, self.labels, self.targets, self.weights):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class _Member:
    """An array in the file, known by its header."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def arrays(path: str) -> dict[str, ArraySource]:
    """Reads an .npz file with the images and labels of each split.

    - `x_NAME` uint8[n, h, w(, c)] and `y_NAME` int[n] or int[n, 1], as in Keras's mnist.npz, or `NAME_images` and
      `NAME_labels`, as in MedMNIST. `images` and `labels` are the split `train`.
    - `class_names` (optional) names the classes, at most 1,000,000; by default they are numbered.
    - `NAME_targets` (`targets`), numbers [n] or [n, k], replace labels; `target_names` names the k targets.
    - `NAME_weights` (`weights`) [n] are the weights of the sampling 'weighted'.

    A file in a bucket is first copied to the local disk. Raises UserError for a file that is damaged, of another kind,
    or too large for the machine.
    """
    file = places.expand_user(path)
    try:
        file = _local_copy(file) if places.in_bucket(file) else file
        with places.open_regular(file) as opened, zipfile.ZipFile(opened) as content:
            return _read(content, path)
    except UserError:
        raise
    except Exception as e:  # zipfile, zlib and NumPy raise many types for damaged files
        raise UserError(f"arrays: cannot read {path!r} as an .npz file: {reason(e)}") from e


def load_array(path: str, names: tuple[str, ...]) -> np.ndarray:
    """Loads the array of a .npy file, or the one of an .npz file that has one of these names or is the only one.

    Raises UserError for a file that is missing, damaged, or larger than memory.
    """
    file = places.expand_user(path)
    try:
        file = _local_copy(file) if places.in_bucket(file) else file
        memory.require(places.size(file), path)
        if file.suffix == ".npy":
            return np.asarray(np.load(io.BytesIO(places.read(file)), allow_pickle=False))
        with places.open_regular(file) as opened, zipfile.ZipFile(opened) as content:
            infos = {info.filename.removesuffix(".npy"): info for info in content.infolist()}
            chosen = [infos[name] for name in names if name in infos] or list(infos.values())[: len(infos) == 1]
            if not chosen:
                raise UserError(f"{path} holds {sorted(infos)[:10]}; expected one array, or {' or '.join(names)}")
            memory.require(chosen[0].file_size, path)
            return _array(content, _member(content, chosen[0]))
    except UserError:
        raise
    except Exception as e:  # zipfile, zlib and NumPy raise many types for damaged files
        raise UserError(f"cannot read {path!r} as a .npy or .npz file: {reason(e)}") from e


def _local_copy(file: Path) -> Path:
    """Copies a file in a bucket to the user's cache folder, unless a copy of the same size and time is there."""
    stat: Any = file.stat()  # of epath
    identity = hashlib.sha256(repr((str(file), stat.length, stat.mtime)).encode()).hexdigest()[:32]
    copy = cache.folder("buckets") / f"{identity}.npz"
    if not copy.is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as source, places.replacing(copy) as target:
            shutil.copyfileobj(source, target, 16 << 20)
    return copy


def _read(content: zipfile.ZipFile, path: str) -> dict[str, ArraySource]:
    infos = {info.filename.removesuffix(".npy"): info for info in content.infolist()}
    splits = _splits(infos, path)
    with_targets = _has_targets(splits, path)
    names_key = "target_names" if with_targets else "class_names"
    weights = {split: "weights" if x == "images" else f"{split}_weights" for split, (x, _) in splits.items()}
    keys = [key for pair in splits.values() for key in pair]
    keys += [key for key in (names_key, *weights.values()) if key in infos]
    members = {key: _member(content, infos[key]) for key in keys}
    for pair in splits.values():
        (_check_targets if with_targets else _check_labels)(members, *pair, path)
    shapes = {(*members[images].shape[1:], 1)[:3]: images for images, _ in splits.values()}
    if len(shapes) > 1:
        (a, first), (b, second) = list(shapes.items())[:2]
        raise UserError(f"arrays: in {path}, the images of {first} are {list(a)} and those of {second} are {list(b)}; "
                        "all splits must have the same height, width and channels")  # fmt: skip
    total = sum(member.info.file_size for member in members.values())
    memory.require(total, f"arrays: {path}")
    ys = {split: _array(content, members[key]) for split, (_, key) in splits.items()}
    if with_targets:
        ys = {split: _as_targets(y, f"arrays: in {path}, {splits[split][1]}") for split, y in ys.items()}
        names = _target_names(content, members.get("target_names"), ys, path)
    else:
        ys = {split: y.reshape(-1) for split, y in ys.items()}
        names = _class_names(content, members.get("class_names"), ys.values(), path)
    out = {}
    for split, (images, key) in splits.items():
        y = ys[split]
        if not with_targets and (int(y.min()) < 0 or int(y.max()) >= len(names)):
            raise UserError(f"arrays: in {path}, {key} has labels outside the {len(names)} classes, 0 to "
                            f"{len(names) - 1}")  # fmt: skip
        x = _array(content, members[images])
        labels, targets = (None, y) if with_targets else (y.astype(np.int32), None)
        split_weights = _array(content, members[weights[split]]) if weights[split] in members else None
        out[split] = ArraySource(x[..., None] if x.ndim == 3 else x, labels, names, targets, split_weights)
    return out


def _has_targets(splits: Mapping[str, tuple[str, str]], path: str) -> bool:
    """Whether the splits have targets instead of labels. Raises UserError if only some of them do."""
    kinds = {key.endswith("targets"): key for _, key in splits.values()}
    if len(kinds) > 1:
        raise UserError(f"arrays: {path} holds {kinds[False]} and {kinds[True]}; give every split labels, or every "
                        "split targets")  # fmt: skip
    return True in kinds


def _as_targets(values: np.ndarray, where: str) -> np.ndarray:
    """Converts numbers [n] or [n, k] to f32[n, k]. Raises UserError naming the first that is not finite."""
    with np.errstate(over="ignore"):
        targets = values.reshape(len(values), -1).astype(np.float32)
    check_finite(targets, lambda i: f"{where}, example {i}")
    return targets


def check_finite(targets: np.ndarray, name: Callable[[int], str]) -> None:
    """Raises UserError for the first NaN or infinity in targets f32[n, k], naming its row by `name`."""
    wrong = np.argwhere(~np.isfinite(targets))
    if wrong.size:
        i, column = map(int, wrong[0])
        more = f" (and {len(wrong) - 1:,} more)" * (len(wrong) > 1)
        raise UserError(f"{name(i)}: target {column} is {targets[i, column]}{more}; targets must be finite float32 "
                        "numbers")  # fmt: skip


def _splits(keys: Iterable[str], path: str) -> dict[str, tuple[str, str]]:
    """Returns {split: (key of its images, key of its labels or targets)} for the keys of a file."""
    keys = sorted(keys)
    pairs = [(key[2:], key, f"y_{key[2:]}") for key in keys if key.startswith("x_")]
    stems = [key.removesuffix("_images") for key in keys if key.endswith("_images")]
    pairs += [(stem, f"{stem}_images", f"{stem}_labels") for stem in stems]
    pairs += [("train", "images", "labels")] if "images" in keys else []
    out: dict[str, tuple[str, str]] = {}
    for split, images, labels in pairs:
        targets = "targets" if images == "images" else f"{split}_targets"
        ys = [key for key in (labels, targets) if key in keys]
        if not split or not ys:
            continue
        if len(ys) > 1:
            raise UserError(f"arrays: {path} holds both {labels} and {targets}; remove one")
        if split in out:
            raise UserError(f"arrays: {path} holds both {out[split][0]} and {images}, two splits {split!r}; remove one")
        out[split] = images, ys[0]
    if not out:
        holds = f"{keys[:10]}{'' if len(keys) <= 10 else ' and more'}"
        raise UserError(f"arrays: {path} holds {holds}; expected x_NAME and y_NAME, such as x_train and y_train, or "
                        "NAME_images and NAME_labels, or images and labels; or NAME_targets for labels")  # fmt: skip
    return out


def _member(content: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    """Reads the header of an array. Raises ValueError if its size is not that of the member."""
    with content.open(info) as stream:
        start = io.BytesIO(stream.read(_HEADER))
    version = np.lib.format.read_magic(start)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in headers:
        raise ValueError(f"{info.filename!r} has the unsupported .npy version {version}")
    shape, _, dtype = headers[version](start)
    nbytes = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and (min(shape, default=0) < 0 or nbytes != info.file_size - start.tell()):
        raise ValueError(f"{info.filename!r} is damaged: its size does not match {dtype}{list(shape)}")
    return _Member(info, shape, dtype)


def _array(content: zipfile.ZipFile, member: _Member) -> np.ndarray:
    with content.open(member.info) as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):  # reading to the end checks the CRC
            raise ValueError(f"{member.info.filename!r} has bytes after its array")
    return array


def _are_images(x: _Member) -> bool:
    sized = len(x.shape) in (3, 4) and min(x.shape) > 0 and (len(x.shape) == 3 or x.shape[3] <= 4)
    return sized and x.dtype == np.uint8


def _check_targets(members: Mapping[str, _Member], images: str, targets: str, path: str) -> None:
    x, y = members[images], members[targets]
    shaped = _are_images(x) and len(y.shape) in (1, 2) and y.shape[0] == x.shape[0] and min(y.shape) > 0
    if not shaped or y.dtype.kind not in "fiub":
        raise UserError(f"arrays: in {path}, {images} is {x} and {targets} is {y}; expected uint8[n, h, w] or uint8[n, "
                        "h, w, c] with c from 1 to 4, and real numbers [n] or [n, k]")  # fmt: skip


def _check_labels(members: Mapping[str, _Member], images: str, labels: str, path: str) -> None:
    x, y = members[images], members[labels]
    n = x.shape[0] if x.shape else 0
    if not _are_images(x) or y.shape not in ((n,), (n, 1)) or y.dtype.kind not in "iu":
        raise UserError(f"arrays: in {path}, {images} is {x} for {math.prod(y.shape)} labels, {y.dtype}; expected "
                        "uint8[n, h, w] or uint8[n, h, w, c] with at least one pixel and c from 1 to 4, and n whole "
                        "numbers")  # fmt: skip


def _class_names(
    content: zipfile.ZipFile, member: _Member | None, labels: Iterable[np.ndarray], path: str
) -> tuple[str, ...]:
    if member is None:
        labels = list(labels)
        classes, examples = 1 + max(int(y.max()) for y in labels), sum(len(y) for y in labels)
        if classes > min(MOST_CLASSES, max(_UNNAMED_CLASSES, examples)):
            raise UserError(f"arrays: in {path}, the greatest of {examples} labels is {classes - 1}; number the "
                            "classes 0, 1, 2, …, or name all of them in class_names")  # fmt: skip
        return tuple(map(str, range(classes)))
    names = _text(content, member, path, "class_names", "class")
    if len(set(names)) < len(names):
        raise UserError(f"arrays: in {path}, class_names holds {len(names)} names, {len(set(names))} of them distinct; "
                        "name each class once")  # fmt: skip
    return names


def _target_names(
    content: zipfile.ZipFile, member: _Member | None, targets: Mapping[str, np.ndarray], path: str
) -> tuple[str, ...]:
    counts = {split: y.shape[1] for split, y in targets.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"arrays: in {path}, the splits have different numbers of targets: {counts}")
    k = next(iter(counts.values()))
    if member is None:
        return ("target",) if k == 1 else tuple(map(str, range(k)))
    names = _text(content, member, path, "target_names", "target")
    if len(names) != k or len(set(names)) != k:
        raise UserError(f"arrays: in {path}, target_names holds {len(names)} names, {len(set(names))} of them "
                        f"distinct, for {k} target{'s' * (k > 1)}; name each of them once")  # fmt: skip
    return names


def _text(content: zipfile.ZipFile, member: _Member, path: str, key: str, what: str) -> tuple[str, ...]:
    if member.dtype.kind not in "USiu" or len(member.shape) != 1 or member.shape[0] > MOST_CLASSES:
        raise UserError(f"arrays: in {path}, {key} is {member}; expected one text per {what}, at most "
                        f"{MOST_CLASSES:,}: np.array(names, dtype=str)")  # fmt: skip
    try:
        array = _array(content, member)
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in array.tolist()]
        "".join(names).encode()  # lone surrogates cannot be printed
    except (ValueError, SystemError) as e:  # SystemError: CPython, for an invalid code point
        raise UserError(f"arrays: in {path}, {key} is not text: {reason(e)}") from e
    return tuple(names)

"""Examples in memory, and the .npz files that hold them.

Files are untrusted: their claimed sizes are checked against the file before memory is allocated.
"""

import hashlib
import io
import math
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imgclf_jax.core import cache, memory, paths
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.data.source import MAX_CLASSES, Source, check_finite

_UNNAMED_CLASSES = 1000  # up to which classes need neither names nor an example each
_HEADER = 12_000  # bytes; NumPy itself refuses a longer array header


def array_source(
    images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], weights: np.ndarray | None = None
) -> Source:
    """The source of uint8[n, h, w, c] in memory with labels int[n] or targets f32[n, k]; `weights` [n] are a column."""
    kind = ("targets",) if labels.ndim == 2 else ()
    digest = hashlib.sha256(str((images.shape, class_names, *kind)).encode())
    for array in (images, labels, weights):
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    columns = {} if weights is None else {"weight": weights}
    return Source(len(images), lambda ids: {"image": images[ids]}, class_names, digest.hexdigest(), labels,
                  columns=columns, thread_safe=True)  # fmt: skip


@dataclass(frozen=True)
class _Member:
    """An array in the file, known by its header."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def arrays(path: str) -> dict[str, Source]:
    """Reads an .npz file with the images and labels of each split.

    - `x_NAME` uint8[n, h, w(, c)] and `y_NAME` int[n] or int[n, 1], as in Keras's mnist.npz, or `NAME_images` and
      `NAME_labels`, as in MedMNIST. `images` and `labels` are the split `train`.
    - `class_names` (optional) names the classes, at most 1,000,000; by default they are numbered.
    - `NAME_targets` (`targets`), numbers [n] or [n, k], replace labels; `target_names` names the k targets.
    - `NAME_weights` (`weights`) [n] are the weights of the sampling 'weighted'.

    A file in a bucket is first copied to the local disk. Raises UserError for a file that is damaged, of another kind,
    or too large for the machine.
    """
    file = paths.expand_user(path)
    try:
        file = _local_copy(file) if paths.in_bucket(file) else file
        with paths.open_regular(file) as opened, zipfile.ZipFile(opened) as content:
            return _read(content, path)
    except UserError:
        raise
    except Exception as e:  # zipfile, zlib and NumPy raise many types for damaged files
        raise UserError(f"arrays: cannot read {path!r} as an .npz file: {reason(e)}") from e


def load_array(path: str, names: tuple[str, ...]) -> np.ndarray:
    """Loads the array of a .npy file, or the one of an .npz file that has one of these names or is the only one.

    Raises UserError for a file that is missing, damaged, or larger than memory.
    """
    file = paths.expand_user(path)
    try:
        file = _local_copy(file) if paths.in_bucket(file) else file
        memory.require(paths.size(file), path)
        if file.suffix == ".npy":
            return np.asarray(np.load(io.BytesIO(paths.read(file)), allow_pickle=False))
        with paths.open_regular(file) as opened, zipfile.ZipFile(opened) as content:
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
        with file.open("rb") as source, paths.replacing(copy) as target:
            shutil.copyfileobj(source, target, 16 << 20)
    return copy


def _read(content: zipfile.ZipFile, path: str) -> dict[str, Source]:
    infos = {info.filename.removesuffix(".npy"): info for info in content.infolist()}
    splits = _splits(infos, path)
    if len(kinds := {y.endswith("targets"): y for _, y in splits.values()}) > 1:
        raise UserError(f"arrays: {path} holds {kinds[False]} and {kinds[True]}; give every split labels, or every "
                        "split targets")  # fmt: skip
    with_targets = True in kinds
    names_key = "target_names" if with_targets else "class_names"
    weights = {split: "weights" if x == "images" else f"{split}_weights" for split, (x, _) in splits.items()}
    keys = [key for pair in splits.values() for key in pair]
    keys += [key for key in (names_key, *weights.values()) if key in infos]
    members = {key: _member(content, infos[key]) for key in keys}
    for x, y in splits.values():
        _check_members(x, members[x], y, members[y], with_targets, path)
    shapes = {(*members[images].shape[1:], 1)[:3]: images for images, _ in splits.values()}
    if len(shapes) > 1:
        (a, first), (b, second) = list(shapes.items())[:2]
        raise UserError(f"arrays: in {path}, the images of {first} are {list(a)} and those of {second} are {list(b)}; "
                        "all splits must have the same height, width and channels")  # fmt: skip
    memory.require(sum(member.info.file_size for member in members.values()), f"arrays: {path}")
    ys = {y: _array(content, members[y]) for _, y in splits.values()}
    if with_targets:
        ys = {key: _as_targets(y, f"arrays: in {path}, {key}") for key, y in ys.items()}
        names = _target_names(content, members.get(names_key), ys, path)
    else:
        ys = {key: y.reshape(-1) for key, y in ys.items()}
        names = _class_names(content, members.get(names_key), list(ys.values()), path)
        for key, labels in ys.items():
            if int(labels.min()) < 0 or int(labels.max()) >= len(names):
                raise UserError(f"arrays: in {path}, {key} has labels outside the {len(names)} classes, 0 to "
                                f"{len(names) - 1}")  # fmt: skip
    out = {}
    for split, (x, y) in splits.items():
        images = _array(content, members[x])
        labels = ys[y] if with_targets else ys[y].astype(np.int32)
        own = _array(content, members[weights[split]]) if weights[split] in members else None
        if own is not None and own.shape != (len(images),):
            raise UserError(f"arrays: in {path}, {weights[split]} is {own.dtype}{list(own.shape)} for {len(images)} "
                            "images; expected one number per image")  # fmt: skip
        out[split] = array_source(images[..., None] if images.ndim == 3 else images, labels, names, own)
    return out


def _as_targets(values: np.ndarray, where: str) -> np.ndarray:
    """Converts numbers [n] or [n, k] to f32[n, k]. Raises UserError naming the first that is not finite."""
    with np.errstate(over="ignore"):
        targets = values.reshape(len(values), -1).astype(np.float32)
    check_finite(targets, lambda i: f"{where}, example {i}")
    return targets


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


def _check_members(x: str, images: _Member, y: str, labels: _Member, with_targets: bool, path: str) -> None:
    """Raises UserError unless these are images and a label or targets for each, by their headers."""
    n = images.shape[0] if images.shape else 0
    are_images = images.dtype == np.uint8 and len(images.shape) in (3, 4) and min(images.shape) > 0
    are_images = are_images and (len(images.shape) == 3 or images.shape[3] <= 4)
    if with_targets:
        fit = len(labels.shape) in (1, 2) and labels.shape[0] == n and min(labels.shape) > 0
        if not are_images or not fit or labels.dtype.kind not in "fiub":
            raise UserError(f"arrays: in {path}, {x} is {images} and {y} is {labels}; expected uint8[n, h, w] or "
                            "uint8[n, h, w, c] with c from 1 to 4, and real numbers [n] or [n, k]")  # fmt: skip
    elif not are_images or labels.shape not in ((n,), (n, 1)) or labels.dtype.kind not in "iu":
        raise UserError(f"arrays: in {path}, {x} is {images} for {math.prod(labels.shape)} labels, {labels.dtype}; "
                        "expected uint8[n, h, w] or uint8[n, h, w, c] with at least one pixel and c from 1 to 4, and n "
                        "whole numbers")  # fmt: skip


def _class_names(
    content: zipfile.ZipFile, member: _Member | None, labels: Sequence[np.ndarray], path: str
) -> tuple[str, ...]:
    if member is None:
        classes, examples = 1 + max(int(y.max()) for y in labels), sum(len(y) for y in labels)
        if classes > min(MAX_CLASSES, max(_UNNAMED_CLASSES, examples)):
            raise UserError(f"arrays: in {path}, the greatest of {examples} labels is {classes - 1}; number the "
                            "classes 0, 1, 2, …, or name all of them in class_names")  # fmt: skip
        return tuple(map(str, range(classes)))
    return _text(content, member, path, "class_names", "class")


def _target_names(
    content: zipfile.ZipFile, member: _Member | None, targets: Mapping[str, np.ndarray], path: str
) -> tuple[str, ...]:
    counts = {key: y.shape[1] for key, y in targets.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"arrays: in {path}, the splits have different numbers of targets: {counts}")
    k = next(iter(counts.values()))
    if member is None:
        return ("target",) if k == 1 else tuple(map(str, range(k)))
    names = _text(content, member, path, "target_names", "target")
    if len(names) != k:
        raise UserError(f"arrays: in {path}, target_names holds {len(names)} names for {k} target{'s' * (k > 1)}")
    return names


def _text(content: zipfile.ZipFile, member: _Member, path: str, key: str, what: str) -> tuple[str, ...]:
    if member.dtype.kind not in "USiu" or len(member.shape) != 1 or member.shape[0] > MAX_CLASSES:
        raise UserError(f"arrays: in {path}, {key} is {member}; expected one text per {what}, at most "
                        f"{MAX_CLASSES:,}: np.array(names, dtype=str)")  # fmt: skip
    try:
        array = _array(content, member)
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in array.tolist()]
        "".join(names).encode()  # lone surrogates cannot be printed
    except (ValueError, SystemError) as e:  # SystemError: CPython, for an invalid code point
        raise UserError(f"arrays: in {path}, {key} is not text: {reason(e)}") from e
    if len(set(names)) < len(names):
        raise UserError(f"arrays: in {path}, {key} holds {len(names)} names, {len(set(names))} of them distinct; name "
                        f"each {what} once")  # fmt: skip
    return tuple(names)

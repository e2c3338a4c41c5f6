"""Examples in memory, and the .npz files that hold them.

A file may come from anywhere. So its sizes are read, and checked against the file, before memory is taken for them.
"""

import hashlib
import io
import math
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imgclf_jax.core import archive, memory, places
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.run import cache

MOST_CLASSES = 1_000_000
_FREELY_NUMBERED = 1000  # So many classes need no names and no example each.
_HEADER = 12_000  # bytes; NumPy itself refuses a longer description of an array
# What a file may unpack to: so much, or so many times its length. Without compression any file is within this.
_UNPACKED, _RATIO = 1 << 30, 100


@dataclass(frozen=True)
class ArraySource:
    """Examples in memory: images uint8[n, h, w, c], labels i32[n]."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, ids: np.ndarray) -> dict[str, Any]:
        """The examples with these ids, in their order."""
        return {"image": self.images[ids], "label": self.labels[ids]}

    def fingerprint(self) -> str:
        """Over all images, labels and class names."""
        digest = hashlib.sha256(str((self.images.shape, self.class_names)).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class _Member:
    """An array in the file, of which the header alone has been read."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def arrays(path: str) -> dict[str, ArraySource]:
    """An .npz file with images uint8[n, h, w(, c)] and labels int[n] or int[n, 1] for each split.

    They are called `x_NAME` and `y_NAME`, as in Keras's mnist.npz, or `NAME_images` and `NAME_labels`, as MedMNIST
    has them; `images` and `labels` are the split `train`. `class_names`, where the file holds it, names the
    classes, at most 1,000,000; otherwise they are numbered. A file in a bucket is copied to this disk first. Raises
    UserError for a file that is damaged, of another kind, too large for the machine, or that unpacks to more than 1
    GiB and more than 100 times its length.
    """
    file = places.place(path)
    try:
        file = _copied(file) if places.in_bucket(file) else file.expanduser()
        if not file.is_file():
            raise OSError("it is no regular file" if file.exists() else f"there is no such file (in {Path.cwd()})")
        with archive.opened(file) as content:
            return _read(content, path, file.stat().st_size)
    except UserError:
        raise
    except Exception as e:  # damage can surface as nearly any error of zipfile, zlib and NumPy
        raise UserError(f"arrays: cannot read {path!r} as an .npz file: {reason(e)}") from e


def _copied(file: Path) -> Path:
    """The copy, in the user's cache folder, of a file in a bucket; made if there is none of its size and time."""
    stat: Any = file.stat()  # epath's own, whose length is in bytes
    identity = hashlib.sha256(repr((str(file), stat.length, stat.mtime)).encode()).hexdigest()[:32]
    copy = cache.folder("buckets") / f"{identity}.npz"
    if not copy.is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as source, places.replacing(copy) as temporary, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 16 << 20)
    return copy


def _read(content: zipfile.ZipFile, path: str, length: int) -> dict[str, ArraySource]:
    infos = {info.filename.removesuffix(".npy"): info for info in content.infolist()}
    splits = _splits(infos, path)
    keys = [key for pair in splits.values() for key in pair] + [key for key in ("class_names",) if key in infos]
    members = {key: _member(content, infos[key]) for key in keys}
    for images, labels in splits.values():
        _check(members, images, labels, path)
    shapes = {(*members[images].shape[1:], 1)[:3]: images for images, _ in splits.values()}
    if len(shapes) > 1:
        (a, first), (b, second) = list(shapes.items())[:2]
        raise UserError(f"arrays: in {path}, the images of {first} are {list(a)} and those of {second} are {list(b)}; "
                        "all splits must have one height, width and number of channels")  # fmt: skip
    total = sum(member.info.file_size for member in members.values())
    if total > max(_UNPACKED, _RATIO * length):
        raise UserError(f"arrays: {path} would unpack from {memory.size(length)} to {memory.size(total)}; above "
                        f"{memory.size(_UNPACKED)} at most {_RATIO} times are allowed, so save it without compression, "
                        "by np.savez")  # fmt: skip
    memory.require(total, f"arrays: {path}")
    ys = {split: _array(content, members[labels]).reshape(-1) for split, (_, labels) in splits.items()}
    class_names = _class_names(content, members.get("class_names"), ys.values(), path)
    out = {}
    for split, (images, labels) in splits.items():
        y = ys[split]
        if int(y.min()) < 0 or int(y.max()) >= len(class_names):
            raise UserError(f"arrays: in {path}, {labels} lies outside the {len(class_names)} classes")
        x = _array(content, members[images])
        out[split] = ArraySource(x[..., None] if x.ndim == 3 else x, y.astype(np.int32), class_names)
    return out


def _splits(keys: Iterable[str], path: str) -> dict[str, tuple[str, str]]:
    """{split: (key of its images, key of its labels)} among the keys of a file."""
    keys = sorted(keys)
    pairs = [(key[2:], key, f"y_{key[2:]}") for key in keys if key.startswith("x_")]
    stems = [key.removesuffix("_images") for key in keys if key.endswith("_images")]
    pairs += [(stem, f"{stem}_images", f"{stem}_labels") for stem in stems]
    pairs += [("train", "images", "labels")] if "images" in keys else []
    out: dict[str, tuple[str, str]] = {}
    for split, images, labels in pairs:
        if not split or labels not in keys:
            continue
        if split in out:
            raise UserError(f"arrays: {path} holds both {out[split][0]} and {images}, two splits {split!r}; remove one")
        out[split] = images, labels
    if not out:
        holds = f"{keys[:10]}{'' if len(keys) <= 10 else ' and more'}"
        raise UserError(f"arrays: {path} holds {holds}; expected x_NAME and y_NAME, such as x_train and y_train, or "
                        "NAME_images and NAME_labels, or images and labels")  # fmt: skip
    return out


def _member(content: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    """Raises ValueError for an array that does not take just the bytes of its member."""
    with content.open(info) as stream:
        start = io.BytesIO(stream.read(_HEADER))
    version = np.lib.format.read_magic(start)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in headers:
        raise ValueError(f"{info.filename!r} is of version {version}")
    shape, _, dtype = headers[version](start)
    nbytes = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and (min(shape, default=0) < 0 or nbytes != info.file_size - start.tell()):
        raise ValueError(f"{info.filename!r} is damaged: {dtype}{list(shape)} does not have its number of bytes")
    return _Member(info, shape, dtype)


def _array(content: zipfile.ZipFile, member: _Member) -> np.ndarray:
    with content.open(member.info) as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):  # at the end the CRC is checked
            raise ValueError(f"{member.info.filename!r} goes on after its array")
    return array


def _check(members: Mapping[str, _Member], images: str, labels: str, path: str) -> None:
    x, y = members[images], members[labels]
    n, *size = x.shape or (0,)
    sized = len(size) in (2, 3) and min(x.shape) > 0 and (len(size) == 2 or size[2] <= 4)
    if x.dtype != np.uint8 or not sized or y.shape not in ((n,), (n, 1)) or y.dtype.kind not in "iu":
        raise UserError(f"arrays: in {path}, {images} is {x} for {math.prod(y.shape)} labels, {y.dtype}; expected "
                        "uint8[n, h, w] or uint8[n, h, w, c] with at least one pixel and c from 1 to 4, and n whole "
                        "numbers")  # fmt: skip


def _class_names(
    content: zipfile.ZipFile, member: _Member | None, labels: Iterable[np.ndarray], path: str
) -> tuple[str, ...]:
    if member is None:
        labels = list(labels)
        classes, examples = 1 + max(int(y.max()) for y in labels), sum(len(y) for y in labels)
        if classes > min(MOST_CLASSES, max(_FREELY_NUMBERED, examples)):
            raise UserError(f"arrays: in {path}, the greatest of {examples} labels is {classes - 1}; number the "
                            "classes 0, 1, 2, …, or name all of them in class_names")  # fmt: skip
        return tuple(map(str, range(classes)))
    if member.dtype.kind not in "USiu" or len(member.shape) != 1 or member.shape[0] > MOST_CLASSES:
        raise UserError(f"arrays: in {path}, class_names is {member}; expected text, one for each class, at most "
                        f"{MOST_CLASSES:,}: np.array(names, dtype=str)")  # fmt: skip
    try:
        array = _array(content, member)
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in array.tolist()]
        "".join(names).encode()  # no text with half a surrogate pair can be printed
    except (ValueError, SystemError) as e:  # CPython's for a number that is no character
        raise UserError(f"arrays: in {path}, class_names is not text: {reason(e)}") from e
    return tuple(names)

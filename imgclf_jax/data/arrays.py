"""Examples in memory, and the .npz files that hold them.

Files are untrusted: what they claim to hold is bounded by the machine's memory, and no pickled object is loaded.
"""

import hashlib
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np

from imgclf_jax.core import memory, paths
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.data.source import MAX_CLASSES, Source

_UNNAMED_CLASSES = 1000  # up to which classes need neither names nor an example each


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
                  columns=columns)  # fmt: skip


def arrays(path: str) -> dict[str, Source]:
    """Reads an .npz file with the images and labels of each split.

    - `x_NAME` uint8[n, h, w(, c)] and `y_NAME` int[n] or int[n, 1], as in Keras's mnist.npz, or `NAME_images` and
      `NAME_labels`, as in MedMNIST. `images` and `labels` are the split `train`.
    - `class_names` (optional) names the classes, at most 1,000,000; by default they are numbered.
    - `NAME_targets` (`targets`), numbers [n] or [n, k], replace labels; `target_names` names the k targets.
    - `NAME_weights` (`weights`) [n] are the weights of the sampling 'weighted'.

    Raises UserError for a file that is damaged, of another kind, or larger than memory.
    """
    where = f"arrays: in {path}"
    content, splits = _load(path)
    if len(kinds := {y.endswith("targets"): y for _, y in splits.values()}) > 1:
        raise UserError(f"arrays: {path} holds {kinds[False]} and {kinds[True]}; give every split labels, or every "
                        "split targets")  # fmt: skip
    for x, y in splits.values():
        _check(x, content[x], y, content[y], where)
    shapes = {(*content[x].shape[1:], 1)[:3]: x for x, _ in splits.values()}
    if len(shapes) > 1:
        (a, first), (b, second) = list(shapes.items())[:2]
        raise UserError(f"{where}, the images of {first} are {list(a)} and those of {second} are {list(b)}; "
                        "all splits must have the same height, width and channels")  # fmt: skip
    ys: dict[str, np.ndarray]
    if True in kinds:
        with np.errstate(over="ignore"):
            ys = {y: content[y].reshape(len(content[y]), -1).astype(np.float32) for _, y in splits.values()}
        names = _target_names(content.get("target_names"), ys, where)
    else:
        ys = {y: content[y].reshape(-1) for _, y in splits.values()}
        names = _class_names(content.get("class_names"), ys, where)
    out = {}
    for split, (x, y) in splits.items():
        images, weights = content[x], content.get(_weights_key(split, x))
        try:
            out[split] = array_source(images if images.ndim == 4 else images[..., None], ys[y], names, weights)
        except UserError as e:
            raise UserError(f"{where}, {y}: {e}") from e
    return out


def load_array(path: str) -> np.ndarray:
    """Loads a .npy file. Raises UserError for one that is missing, damaged, or larger than memory."""
    file = paths.as_path(path)
    try:
        memory.require(paths.size(file), path)
        with paths.open_regular(file) as opened:
            return np.lib.format.read_array(opened)
    except UserError:
        raise
    except Exception as e:  # NumPy raises many types for damaged files
        raise UserError(f"cannot read {path!r} as a .npy file: {reason(e)}") from e


def _load(path: str) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, str]]]:
    """Loads the arrays of an .npz file that its `_splits` may use. Returns them, and the splits."""
    file = paths.as_path(path)
    try:
        with paths.open_regular(file) as opened, zipfile.ZipFile(opened) as content:
            infos = {info.filename.removesuffix(".npy"): info for info in content.infolist()}
            splits = _splits(infos, path)
            used = {key for split, (x, y) in splits.items() for key in (x, y, _weights_key(split, x))}
            chosen = [key for key in infos if key in used | {"class_names", "target_names"}]
            memory.require(sum(infos[key].file_size for key in chosen), f"arrays: {path}")
            return {key: _array(content, infos[key]) for key in chosen}, splits
    except UserError:
        raise
    except Exception as e:  # zipfile, zlib and NumPy raise many types for damaged files
        raise UserError(f"arrays: cannot read {path!r} as an .npz file: {reason(e)}") from e


def _array(content: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with content.open(info) as stream:
        array = np.lib.format.read_array(stream)
        if stream.read(1):  # reading to the end checks the CRC
            raise ValueError(f"{info.filename!r} has bytes after its array")
    return array


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
        raise UserError(f"arrays: {path} holds {keys[:10]}; expected x_NAME and y_NAME, such as x_train and y_train, "
                        "or NAME_images and NAME_labels, or images and labels; or NAME_targets for labels")  # fmt: skip
    return out


def _weights_key(split: str, images: str) -> str:
    return "weights" if images == "images" else f"{split}_weights"


def _check(x: str, images: np.ndarray, y: str, labels: np.ndarray, where: str) -> None:
    """Raises UserError unless these are images and a label, or targets, for each."""
    fits = images.dtype == np.uint8 and images.ndim in (3, 4) and images.size > 0 and (*images.shape, 1)[3] <= 4
    if y.endswith("targets"):
        fits = fits and labels.ndim in (1, 2) and labels.dtype.kind in "fiub"
        expected = "real numbers [n] or [n, k]"
    else:
        fits = fits and labels.ndim > 0 and labels.shape[1:] in ((), (1,)) and labels.dtype.kind in "iu"
        expected = "whole numbers [n]"
    if not fits or not labels.size or len(labels) != len(images):
        raise UserError(f"{where}, {x} is {images.dtype}{list(images.shape)} and {y} is {labels.dtype}"
                        f"{list(labels.shape)}; expected uint8[n, h, w] or uint8[n, h, w, c] with at least one pixel "
                        f"and c from 1 to 4, and {expected}")  # fmt: skip


def _class_names(names: np.ndarray | None, labels: Mapping[str, np.ndarray], where: str) -> tuple[str, ...]:
    if names is not None:
        return _text(names, where, "class_names")
    classes, examples = 1 + max(int(y.max()) for y in labels.values()), sum(map(len, labels.values()))
    if classes > min(MAX_CLASSES, max(_UNNAMED_CLASSES, examples)):
        raise UserError(f"{where}, the greatest of {examples} labels is {classes - 1}; number the classes 0, 1, 2, …, "
                        "or name all of them in class_names")  # fmt: skip
    return tuple(map(str, range(classes)))


def _target_names(names: np.ndarray | None, targets: Mapping[str, np.ndarray], where: str) -> tuple[str, ...]:
    k = max(y.shape[1] for y in targets.values())  # the source refuses a split with fewer
    if names is not None:
        return _text(names, where, "target_names")
    return ("target",) if k == 1 else tuple(map(str, range(k)))


def _text(array: np.ndarray, where: str, key: str) -> tuple[str, ...]:
    if array.dtype.kind not in "USiu" or array.ndim != 1 or len(array) > MAX_CLASSES:
        raise UserError(f"{where}, {key} is {array.dtype}{list(array.shape)}; expected one text per class, at most "
                        f"{MAX_CLASSES:,}: np.array(names, dtype=str)")  # fmt: skip
    try:
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in array.tolist()]
        "".join(names).encode()  # lone surrogates cannot be printed
    except (ValueError, SystemError) as e:  # SystemError: CPython, for an invalid code point
        raise UserError(f"{where}, {key} is not text: {reason(e)}") from e
    return tuple(names)

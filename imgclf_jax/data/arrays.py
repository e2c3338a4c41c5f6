"""Examples in memory, and the .npz files that hold them.

Files are untrusted: what they claim to hold is bounded by the machine's memory, and no pickled object is loaded.
"""

import hashlib
import re
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np

from imgclf_jax.core import machine, paths
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.data.source import MAX_CLASSES, Source

_NAMES = ("class_names", "target_names")
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
    - `NAME_targets` (`targets`), numbers [n] or [n, k], replace labels; `target_names` or `class_names` names them.
    - `NAME_weights` (`weights`) [n] are the weights of the sampling 'weighted'.

    Raises UserError for a file that is damaged, of another kind, or larger than memory.
    """
    where = f"arrays: in {path}"
    content, splits = _load(path)
    if len(kinds := {y.endswith("targets"): y for _, y, _ in splits.values()}) > 1:
        raise UserError(f"arrays: {path} holds {kinds[False]} and {kinds[True]}; give every split labels, or every "
                        "split targets")  # fmt: skip
    for x, y, _ in splits.values():
        _check(x, content[x], y, content[y], where)
    ys: dict[str, np.ndarray] = {y: content[y].reshape(-1) for _, y, _ in splits.values()}
    if True in kinds:
        with np.errstate(over="ignore"):  # `Source` refuses infinite targets
            ys = {y: content[y].reshape(len(content[y]), -1).astype(np.float32) for y in ys}
    if len(given := [content[key] for key in _NAMES if key in content]) > 1:
        raise UserError(f"{where}, both {' and '.join(_NAMES)} name the same; keep one")
    names = _number_classes(ys, where) if not given else _text(given[0], where)
    out = {}
    for split, (x, y, weights) in splits.items():
        images = content[x] if content[x].ndim == 4 else content[x][..., None]
        try:
            out[split] = array_source(images, ys[y], names, content.get(weights))
        except UserError as e:
            raise UserError(f"{where}, {y}: {e}") from e
    return out


def load_array(path: str) -> np.ndarray:
    """Loads a .npy file. Raises UserError for one that is missing, damaged, or larger than memory."""
    file = paths.as_path(path)
    try:
        machine.require_memory(paths.size(file), path)
        with paths.open_regular(file) as opened:
            return np.lib.format.read_array(opened)
    except UserError:
        raise
    except Exception as e:  # NumPy raises many types for damaged files
        raise UserError(f"cannot read {path!r} as a .npy file: {reason(e)}") from e


def _load(path: str) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, str, str]]]:
    """Loads the arrays of an .npz file that its `_splits` may use. Returns them, and the splits."""
    file = paths.as_path(path)
    try:
        with paths.open_regular(file) as opened, zipfile.ZipFile(opened) as content:
            infos = {info.filename.removesuffix(".npy"): info for info in content.infolist()}
            splits = _splits(infos, path)
            used = {*_NAMES, *(key for keys in splits.values() for key in keys)} & infos.keys()
            machine.require_memory(sum(infos[key].file_size for key in used), f"arrays: {path}")
            return {key: _array(content, infos[key]) for key in used}, splits
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


def _splits(keys: Iterable[str], path: str) -> dict[str, tuple[str, str, str]]:
    """Returns {split: the keys of its images, its labels or targets, and its weights} for the keys of a file."""
    keys, out = sorted(keys), dict[str, tuple[str, str, str]]()
    for x in keys:
        if not (match := re.fullmatch("images|x_(.+)|(.+)_images", x)):
            continue
        split = match[1] or match[2] or "train"
        prefix = "" if x == "images" else f"{split}_"
        labels = f"y_{split}" if match[1] else f"{prefix}labels"
        for y in {labels, f"{prefix}targets"} & set(keys):
            if split in out:
                raise UserError(f"arrays: {path} holds {x} and {y} beside {' and '.join(out[split][:2])}; remove some, "
                                f"since all are of the split {split!r}")  # fmt: skip
            out[split] = x, y, f"{prefix}weights"
    if not out:
        raise UserError(f"arrays: {path} holds {keys[:10]}; expected x_NAME and y_NAME, such as x_train and y_train, "
                        "or NAME_images and NAME_labels, or images and labels; or NAME_targets for labels")  # fmt: skip
    return out


def _check(x: str, images: np.ndarray, y: str, labels: np.ndarray, where: str) -> None:
    """Raises UserError unless these are images and a label, or targets, for each."""
    kinds, columns = ("fiub", labels.shape[1:]) if y.endswith("targets") else ("iu", (1,))
    fits = images.dtype == np.uint8 and images.ndim in (3, 4) and images.size > 0 and (*images.shape, 1)[3] <= 4
    fits = fits and labels.dtype.kind in kinds and labels.ndim in (1, 2) and labels.shape[1:] in ((), columns)
    if not fits or not labels.size or len(labels) != len(images):
        raise UserError(f"{where}, {x} is {images.dtype}{list(images.shape)} and {y} is {labels.dtype}"
                        f"{list(labels.shape)}; expected uint8[n, h, w] or uint8[n, h, w, c] with c from 1 to 4, and "
                        "labels int[n], or targets [n] or [n, k]")  # fmt: skip


def _number_classes(ys: Mapping[str, np.ndarray], where: str) -> tuple[str, ...]:
    """Names for the classes of labels int[n], or for the k columns of targets f32[n, k]: their numbers."""
    if columns := max(y.shape[1:] for y in ys.values()):  # the source refuses a split with fewer
        return ("target",) if columns == (1,) else tuple(map(str, range(*columns)))
    classes, examples = 1 + max(int(y.max()) for y in ys.values()), sum(map(len, ys.values()))
    least = min(int(y.min()) for y in ys.values())
    if least > 0 or classes > min(MAX_CLASSES, max(_UNNAMED_CLASSES, examples)):
        raise UserError(f"{where}, the {examples} labels are from {least} to {classes - 1}; number the classes 0, 1, "
                        "2, …, or name all of them in class_names")  # fmt: skip
    return tuple(map(str, range(classes)))


def _text(array: np.ndarray, where: str) -> tuple[str, ...]:
    try:
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in array.tolist()]
        "".join(names).encode()  # lone surrogates cannot be printed
    except (TypeError, ValueError, SystemError) as e:  # SystemError: CPython, for an invalid code point
        raise UserError(f"{where}, the names are not text, one per class: {reason(e)}") from e
    return tuple(names)

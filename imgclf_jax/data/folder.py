"""The user's own images: one sub-folder a class, or `train/`, `test/`, … of those."""

import concurrent.futures
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imgclf_jax.core.errors import UserError
from imgclf_jax.data.decode import decode
from imgclf_jax.run import cache

SPLIT_NAMES = ("train", "test", "val", "validation")


@dataclass(frozen=True)
class FolderSource:
    """Image files, read as bytes. Their order is that of a hash of their names, so any slice holds all classes."""

    root: Path
    files: tuple[str, ...]  # relative to root
    labels: np.ndarray  # i32[n]
    sizes: tuple[int, ...]  # bytes
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, ids: np.ndarray) -> dict[str, Any]:
        return {"image": [(self.root / self.files[i]).read_bytes() for i in ids], "label": self.labels[ids]}

    def name(self, i: int) -> str:
        """The file of an example, for error messages."""
        return str(self.root / self.files[i])

    def fingerprint(self) -> str:
        """Over names, sizes and classes; contents are not read."""
        whole = json.dumps([self.files, self.sizes, self.class_names])
        return hashlib.sha256(whole.encode()).hexdigest()


def folder(path: str, train_per_class: int = 0, draw: int = 0) -> dict[str, FolderSource]:
    """Images under `path`: `path/CLASS/…` is the split `train`; `path/train/CLASS/…` and `path/test/CLASS/…` are two.

    With `train_per_class`, so many images of each class of the former are `train`, and all others `test`; which ones
    follows from their names and the number `draw`, for splits of their own for several runs.

    Every file is decoded once, in parallel, so that a broken one is named here and not in mid-training; which files
    were good is remembered, by size and time of change, in the user's cache folder. Hidden files are passed over.
    Raises UserError naming the folder or file at fault.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"folder: there is no directory {str(root)!r} (working directory: {Path.cwd()})")
    inner = _subfolders(root)
    split_roots = {d.name: d for d in inner if d.name in SPLIT_NAMES and _subfolders(d)} or {"train": root}
    # The classes of every split are those of the union, so that labels agree between splits.
    class_names = tuple(sorted({d.name for split in split_roots.values() for d in _subfolders(split)}))
    if len(class_names) < 2:
        raise UserError(f"folder: {root} holds {len(class_names)} class folders; expected at least two, one a class")
    out = {name: _scan(split_root, class_names) for name, split_root in split_roots.items()}
    for source in out.values():
        _check(source)
    return _few(out, train_per_class, draw) if train_per_class else out


def _few(splits: dict[str, FolderSource], train_per_class: int, draw: int) -> dict[str, FolderSource]:
    """The split `train` of one without a test split, cut into `train` and `test`."""
    source = splits["train"] if splits.keys() == {"train"} else None
    if source is None or train_per_class < 0:
        raise UserError(
            f"folder(train_per_class={train_per_class}) is a number above zero, for a folder without train/ and test/"
        )
    chosen = np.zeros(len(source), bool)
    for label, name in enumerate(source.class_names):
        places = np.flatnonzero(source.labels == label)
        if len(places) <= train_per_class:
            raise UserError(
                f"folder(train_per_class={train_per_class}): the class {name!r} has {len(places)} images, and none "
                "would be left for `test`; take fewer, or remove the class"
            )
        keys = [hashlib.sha256(os.fsencode(f"{draw}/{source.files[i]}")).digest() for i in places]
        chosen[places[sorted(range(len(places)), key=keys.__getitem__)[:train_per_class]]] = True

    def part(which: np.ndarray) -> FolderSource:
        places = np.flatnonzero(which)
        files, sizes = tuple(source.files[i] for i in places), tuple(source.sizes[i] for i in places)
        return FolderSource(source.root, files, source.labels[places], sizes, source.class_names)

    return {"train": part(chosen), "test": part(~chosen)}


def _subfolders(path: Path) -> list[Path]:
    return sorted(d for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))


def _scan(root: Path, class_names: tuple[str, ...]) -> FolderSource:
    found: list[tuple[str, int, int]] = []
    for class_folder in _subfolders(root):
        before = len(found)
        for directory, subdirectories, names in os.walk(class_folder):
            subdirectories[:] = [d for d in subdirectories if not d.startswith(".")]
            for name in names:
                file = Path(directory, name)
                if not name.startswith(".") and name != "Thumbs.db":
                    try:
                        size = file.stat().st_size
                    except OSError as e:  # a link to nowhere, say
                        raise UserError(f"folder: {file}: {e.strerror}; repair, move or remove it") from e
                    relative = file.relative_to(root).as_posix()
                    found.append((relative, class_names.index(class_folder.name), size))
        if len(found) == before:
            raise UserError(f"folder: the class folder {class_folder} holds no images; add some or remove it")
    found.sort(key=lambda f: hashlib.sha256(os.fsencode(f[0])).digest())
    files, labels, sizes = zip(*found, strict=True)
    return FolderSource(root, files, np.array(labels, np.int32), sizes, class_names)


def _check(source: FolderSource) -> None:
    """Decodes each file that is not known to be good; UserError names the broken ones."""
    record = cache.folder("checked") / (hashlib.sha256(str(source.root.resolve()).encode()).hexdigest()[:32] + ".json")
    try:
        good = dict(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):
        good = {}
    stamps = {}
    for name in source.files:
        stat = (source.root / name).stat()
        stamps[name] = [stat.st_size, stat.st_mtime_ns]
    to_check = [name for name in source.files if good.get(name) != stamps[name]]

    def error(name: str) -> str | None:
        try:
            decode((source.root / name).read_bytes())
        except (OSError, UserError) as e:
            return f"{source.root / name} ({e})"
        return None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        errors = [e for e in pool.map(error, to_check) if e]
    if errors:
        more = f" and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise UserError(f"folder: not a readable image: {'; '.join(errors[:3])}{more}; repair, move or remove it")
    if to_check:
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(stamps))
        except OSError:
            pass  # Only a memory of what was checked: without it the next start checks again.

"""Which folders are splits, by their names: `train/`, `val/` and `test/`, and what else these are called."""

import os
from pathlib import Path

_ROLES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "test", "testing": "test"}  # fmt: skip


def split_folders(path: str | Path) -> dict[str, str]:
    """{name: "train", "val" or "test"} of the folders in `path` that are splits, in this order of roles.

    A split folder holds folders, of which each is a class. Capitals do not matter. Where there is no directory `path`,
    or it cannot be read, there is no split.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(Path(path).expanduser()) if entry.name.lower() in _ROLES)
        found = {name: _ROLES[name.lower()] for name in names if class_folders(Path(path).expanduser() / name)}
    except (OSError, RuntimeError):
        return {}
    return dict(sorted(found.items(), key=lambda item: ("train", "val", "test").index(item[1])))


def split_order(name: str) -> tuple[int, str]:
    """The key that sorts splits by their roles: train, val, test, then others by name."""
    roles = ("train", "val", "test")
    return roles.index(_ROLES[name.lower()]) if name.lower() in _ROLES else len(roles), name


def class_folders(path: Path) -> list[Path]:
    """The folders in `path` that are not hidden, by name; none where `path` is no directory. Raises OSError."""
    if not path.is_dir():
        return []
    return sorted(Path(entry.path) for entry in os.scandir(path) if not entry.name.startswith(".") and entry.is_dir())

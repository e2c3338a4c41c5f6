"""Recognizes split folders by name: `train/`, `val/`, `test/` and their synonyms."""

import os
from pathlib import Path

_ROLES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "test", "testing": "test"}  # fmt: skip


def split_folders(path: str | Path) -> dict[str, str]:
    """Returns {name: "train", "val" or "test"} for the split folders in `path`, in this order of roles.

    A split folder holds a folder per class. Case does not matter. A missing or unreadable `path` has no splits.
    """
    try:
        folders = class_folders(Path(path).expanduser())
        splits = [folder.name for folder in folders if role_of(folder.name) and class_folders(folder)]
    except (OSError, RuntimeError):
        return {}
    return {name: role_of(name) for name in sorted(splits, key=split_order)}


def role_of(name: str) -> str:
    """ "train", "val" or "test" for a split of such a name; "" for any other."""
    return _ROLES.get(name.lower(), "")


def split_order(name: str) -> tuple[int, str]:
    """The sort key of a split: train, val, test, then others by name."""
    return ("train", "val", "test", "").index(role_of(name)), name


def class_folders(path: Path) -> list[Path]:
    """The folders in `path` that are not hidden, by name; none if `path` is not a directory. Raises OSError."""
    if not path.is_dir():
        return []
    return sorted(Path(entry.path) for entry in os.scandir(path) if not entry.name.startswith(".") and entry.is_dir())

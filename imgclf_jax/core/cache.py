"""The user's cache folder, whose contents can be recomputed."""

import os
from pathlib import Path


def folder(name: str) -> Path:
    """`~/.cache/imgclf_jax/NAME`, or the same under XDG_CACHE_HOME. The folder may not exist yet.

    XDG_CACHE_HOME counts only if it is an absolute path, as its specification says. For a user without a home it is a
    path where no folder can be created, so nothing is cached.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    return Path(base if os.path.isabs(base) else os.devnull) / "imgclf_jax" / name

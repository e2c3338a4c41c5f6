"""The user's cache folder, whose contents can be recomputed."""

import os
from pathlib import Path


def folder(name: str) -> Path:
    """`~/.cache/imgclf_jax/NAME`, or the same under XDG_CACHE_HOME. The folder may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "imgclf_jax", name)

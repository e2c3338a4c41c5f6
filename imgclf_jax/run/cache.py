"""The user's cache folder: what can be made again, kept between runs."""

import os
from pathlib import Path


def folder(name: str) -> Path:
    """`~/.cache/imgclf_jax/NAME` (or under XDG_CACHE_HOME); it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "imgclf_jax" / name

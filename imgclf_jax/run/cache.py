"""The user's cache folder. It holds what is kept between runs and can be made again."""

import os
from pathlib import Path


def folder(name: str) -> Path:
    """`~/.cache/imgclf_jax/NAME`, or the same under XDG_CACHE_HOME. The folder may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "imgclf_jax" / name

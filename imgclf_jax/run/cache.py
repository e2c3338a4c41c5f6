"""The user's cache folder. It holds what is kept between runs and can be made again."""

import os
from pathlib import Path


def folder(name: str) -> Path:
    """`~/.cache/imgclf_jax/NAME`, or the same under XDG_CACHE_HOME. The folder may not exist yet.

    XDG_CACHE_HOME counts if it is an absolute path, as its specification says. Where the user has no home, it is a
    place in which no folder can be made: nothing is kept.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    return Path(base if os.path.isabs(base) else os.devnull) / "imgclf_jax" / name

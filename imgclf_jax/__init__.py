"""imgclf_jax: image-classification research in JAX, where a batch is a pure function of (seed, step)."""

import importlib
from typing import Any

__version__ = "0.1.0"

# What `imgclf_jax.NAME` is: imported when it is first asked for, since it takes JAX with it.
_NAMES = {"load": "loading", "Trained": "trained"}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'imgclf_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"imgclf_jax.{_NAMES[name]}"), name)

"""imgclf_jax: image-classification research in JAX, where a batch is a pure function of (seed, step)."""

import importlib
from typing import Any

__version__ = "0.2.0"

_LAZY = ("load", "Trained")  # of imgclf_jax.trained, imported on first use since it imports JAX


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'imgclf_jax' has no attribute {name!r}")
    return getattr(importlib.import_module("imgclf_jax.trained"), name)


def __dir__() -> list[str]:
    return ["__version__", *_LAZY]

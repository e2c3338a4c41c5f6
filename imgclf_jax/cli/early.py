"""Refuses missing files, folders and packages that the command line names, before JAX is imported."""

import glob
import importlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imgclf_jax.cli.table import COMMANDS
from imgclf_jax.core import extras, paths
from imgclf_jax.core.errors import UserError, no_such
from imgclf_jax.data import image_files


def check(name: str, files: Sequence[str], options: dict[str, Any]) -> None:
    """Raises UserError if a package, file or folder that a command line needs is missing."""
    command = COMMANDS[name]
    if command.extra:
        extras.require(command.extra, name)
    if name == "features" and options.get("output") == "":
        raise UserError("features: name the file to write: --output FILE.npz")
    for flag, suffixes in command.writes.items():
        text, file = options.get(flag, ""), Path(options.get(flag, ""))
        if text and "://" not in text:
            paths.check_output(file, f"--{flag}", suffixes or (file.suffix,))
    if options.get("plot"):
        extras.require("plot", f"--plot={options['plot']}")
    if "GLOB" in command.files:
        _check_images(name, files)
    if command.before_jax:
        module, _, function = command.before_jax.partition(":")
        getattr(importlib.import_module(f"imgclf_jax.{module}"), function)(files=files, **options)


def _check_images(command: str, words: Sequence[str]) -> None:
    """Raises UserError if a word names nothing or no regular file, or if a directory has no images."""
    if not words and not COMMANDS[command].files.startswith("["):
        raise UserError(f"{command}: name at least one image: {command} FILE|DIR|GLOB|- … --workdir DIR")
    for word in (word for word in words if word != "-"):
        if os.path.isdir(word):
            if next(image_files.walk(word, Counter()), None) is None:
                raise UserError(f"{command}: the directory {word!r} has no images")
        elif not os.path.exists(word):
            if not glob.has_magic(word):
                raise no_such(command, "file or directory", word)
            if not image_files.match(word):
                raise UserError(f"{command}: the pattern {word!r} matches no file (working directory: {Path.cwd()})")
        elif not os.path.isfile(word):
            raise UserError(f"{command}: {word!r} is a pipe, socket or device; name image files or directories")

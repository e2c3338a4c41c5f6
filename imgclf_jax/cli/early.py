"""Refuses missing runs, files, folders and packages before JAX is imported."""

import ast
import glob
import importlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.cli.table import COMMANDS
from imgclf_jax.cli.words import configs_folder
from imgclf_jax.core import extras, paths
from imgclf_jax.core.errors import UserError, no_such
from imgclf_jax.core.typing import Value
from imgclf_jax.data import image_files

_TEXT = r"""(?<![\w.:])(folder|table|arrays|tfds|distill)\(\s*(?:path=)?((['"])(?:\\.|(?!\3).)*\3)"""


def check(name: str, files: Sequence[str], options: dict[str, Value]) -> None:
    """Raises UserError if a package, file or folder that a command line needs is missing."""
    command = COMMANDS[name]
    if command.extra:
        extras.require(command.extra, name)
    for flag, suffixes in command.writes.items():
        text, file = str(options[flag]), Path(str(options[flag]))
        if name == "features" and not text:
            raise UserError("features: name the file to write: --output FILE.npz")
        if text and "://" not in text:
            paths.check_output(file, f"--{flag}", suffixes or (file.suffix,))
    if options.get("plot"):
        extras.require("plot", f"--plot={options['plot']}")
    if "GLOB" in command.files:
        _check_images(name, files)
    for word in files if command.config_from == "none" else ():
        if "://" not in word and not os.path.isdir(word):
            raise UserError(f"{word} is not a directory; name work directories, or a folder that holds some")
    if command.config_from == "record" and files and not os.path.isfile(files[0]):
        check_run(name, files[0], "name the work directory of a run, or a bundle")
    if command.before_jax:
        module, _, function = command.before_jax.partition(":")
        getattr(importlib.import_module(f"imgclf_jax.{module}"), function)(files=files, **options)


def check_run(name: str, workdir: str, fix: str) -> None:
    """Raises UserError unless the work directory holds a run; `fix` is "" for the default one."""
    path = paths.as_path(workdir)
    if not paths.in_bucket(path) and not (path / "config.json").is_file():
        if not fix:
            raise UserError(f"{name} needs a run: pass --workdir=DIR; the default, {path.absolute()}, holds no run")
        raise UserError(f"{path} holds no run: there is no {path.absolute() / 'config.json'}; {fix}")


def check_config(file: str, config: ConfigDict, starts: bool) -> None:
    """Raises UserError if a path or package that a config's sources need is missing.

    So it does for `init_from` if the run `starts`. `file` is the config file, with its argument. Addresses in buckets
    are checked later.
    """

    def check(what: str, kind: str, text: str, exists: Callable[[Path], bool]) -> None:
        path = paths.expand_user(text) if "://" not in text else None
        if path and not exists(path):
            raise _lacks_argument(file, text) or no_such(what, kind, path)

    texts = [text for value in configs.flatten(config).values()
             for text in (value.values() if isinstance(value, dict) else [value]) if isinstance(text, str)]  # fmt: skip
    for call, literal, _ in re.findall(_TEXT, "\n".join(texts)):
        path = ast.literal_eval(literal)
        if call == "tfds":
            extras.require("tfds", f"tfds({literal})")
        elif call in ("table", "arrays"):
            check(call, "file", path, Path.is_file)
        else:
            check(call, "directory", path, Path.is_dir)
    if starts and config.init_from:
        check("init_from", "file or work directory", config.init_from, Path.exists)


def _lacks_argument(file: str, default: str) -> UserError | None:
    """The error for a config without its argument, if `default` is the argument's default; else None."""
    pattern = rf"""^def get_config\((\w+)[^)]*=\s*["']{re.escape(default)}["']"""
    if ":" in file or not (argument := re.search(pattern, Path(file).read_text(encoding="utf-8"), re.MULTILINE)):
        return None
    name = Path(file).stem if Path(file).parent == configs_folder() else file
    return UserError(f"--config={name} takes an argument: write --config={name}:{argument[1].upper()}")


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

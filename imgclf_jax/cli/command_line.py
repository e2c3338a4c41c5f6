"""A parsed command line: the config file it names, and the keys it overrides. Imports neither JAX nor TensorFlow."""

import ast
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core import spec
from imgclf_jax.core.errors import UsageError, unknown
from imgclf_jax.core.typing import Value


@dataclass(frozen=True)
class CommandLine:
    """What the user typed."""

    command: str
    program: list[str]  # starts this program in a new process
    config_file: str  # with its argument
    names_config: bool  # whether --config is given
    workdir: str  # "" if --workdir is not given
    overrides: list[tuple[str, str]]  # each --config.KEY=VALUE
    files: list[str]
    options: dict[str, Any]  # the command's other flags
    environment: dict[str, str]  # at the start


def configs_folder() -> Path:
    """The folder of the configs that ship: in a clone `configs/`, in an installed package `imgclf_jax/configs/`."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def find_config(path: str) -> str:
    """The config file that --config=PATH[:ARG] names, with its argument.

    A plain name such as `digits` is a config that ships, unless there is a file of that name. From now on, the user's
    own modules are also found in the config file's folder and the working directory.
    """
    name, colon, argument = path.partition(":")
    file = Path(name)
    if not file.is_file():
        ships = sorted(own.stem for own in configs_folder().glob("*.py"))
        if name not in ships:
            raise UsageError(unknown("config", name, ships) + ", or a Python file")
        file = configs_folder() / f"{name}.py"
    folder = file.resolve().parent
    spec.folders[:] = [str(folder), str(Path.cwd())]
    if folder != configs_folder().resolve():  # for what the config imports; last, to shadow no installed package
        sys.path.append(str(folder))
    return f"{file}{colon}{argument}"


def override(config: ConfigDict, overrides: Iterable[tuple[str, str]]) -> None:
    """Sets keys to values as on the command line; `data.eval.NAME` and `data.extra.NAME` may be new.

    Raises UsageError for an unknown key and for a value of another type than the key's. `validate` the config then.
    """
    for key, text in overrides:
        if named := re.fullmatch(r"data\.(eval|extra)\.([^.]*)", key):
            with config.unlocked():
                config.data[named[1]][named[2]] = text
            continue
        old = configs.flatten(config)
        if key not in old:
            raise UsageError(unknown("config key", key, configs.KEYS))
        parent, _, leaf = key.rpartition(".")
        (config[parent] if parent else config)[leaf] = _parse(key, text, old[key])


_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def _parse(key: str, text: str, old: Value) -> Value:
    """Parses text as a value of the type of `old`."""
    try:
        if isinstance(old, bool):
            return _BOOLEANS[text.lower()]
        if not isinstance(old, dict):
            return type(old)(text)
        value = ast.literal_eval(text)
        if not all(isinstance(split, str) for split in value.values()):
            raise ValueError
        return ConfigDict(value)
    except (ValueError, KeyError, AttributeError, TypeError, SyntaxError, MemoryError, RecursionError) as e:
        wanted = f"must be a value of type {type(old).__name__}, such as {old!r}"
        raise UsageError(f"--config.{key}={text}: {wanted}") from e

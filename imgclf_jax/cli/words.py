"""The words of a command line: its config, its keys, its flags and its files. Imports neither JAX nor TensorFlow."""

import itertools
import keyword
import re
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from imgclf_jax import config as configs
from imgclf_jax.cli.flags import FLAGS
from imgclf_jax.cli.table import COMMANDS, commands_with
from imgclf_jax.core.errors import unknown


class UsageError(Exception):
    """A wrong flag: exit status 2."""


def take_flags(command: str, argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """The flags of a command, and the words that are none of them: files, and keys of the config.

    Raises UsageError for a wrong value, and for a flag that the command does not take.
    """
    try:
        values = flags.FlagValues()
        for flag in COMMANDS[command].flags:
            COMMANDS[command].flag(flag).define(flag, values)
        values.set_gnu_getopt(True)  # flags may stand after files
        rest = values(["launch.py", *argv], known_only=True)[1:]
    except flags.Error as e:
        raise UsageError(str(e)) from e
    for word in itertools.takewhile(lambda word: word != "--", rest):
        flag = word.lstrip("-").partition("=")[0]
        if word.startswith("-") and flag and flag != "config" and not flag.startswith("config."):
            raise _unknown_flag(flag, command)
    return values, rest


def files_alone(command: str, words: list[str]) -> list[str]:
    """The words, of a command that takes files and no config."""
    if not words:
        raise UsageError(f"{command} wants {COMMANDS[command].files}")
    for word in itertools.takewhile(lambda word: word != "--", words):
        if word.lstrip("-").startswith("config") and word.startswith("-"):
            raise UsageError(f"{command} takes no config, found {word!r}")
    return [word for word in words if word != "--"]


def _unknown_flag(flag: str, command: str) -> UsageError:
    if flag in FLAGS:
        return UsageError(f"{command} does not take --{flag}; these commands do: {', '.join(commands_with(flag))}")
    return UsageError(unknown("flag", flag, ("config", *COMMANDS[command].flags)))


def override(config: ConfigDict, words: list[str], command: str) -> list[str]:
    """Applies each --config.KEY=VALUE in `words` to `config`; returns the words that are no flags."""
    for word in words:
        key = word.lstrip("-").partition("=")[0].removeprefix("config.")
        if word.startswith(("--config.", "-config.")) and key not in configs.flatten(config):
            name = key.removeprefix("data.eval.").removeprefix("data.extra.")
            if name == key or "." in name:
                raise UsageError(unknown("config key", key, configs.KEYS))
            if key.startswith("data.extra."):  # one more stream
                with config.unlocked():
                    config.data.extra[name] = ""
                continue
            configs.check_set_name(name)
            if not name.isidentifier() or keyword.iskeyword(name):
                raise UsageError(f"--config.data.eval.{name}: on the command line the name of a set has letters, digits"
                                 " and _, and begins with a letter; name it in the config file")  # fmt: skip
            with config.unlocked():  # one more evaluation set
                config.data.eval[name] = ""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["launch.py", *words])
        return values(["launch.py", *words])[1:]
    except flags.UnrecognizedFlagError as e:
        raise _unknown_flag(e.flagname, command) from e
    except flags.Error as e:
        match = re.match(r"flag --config\.([\w.]+)=", str(e))
        if not match:
            raise UsageError(str(e)) from e
        old = configs.flatten(config)[match[1]]
        given = next((w for w in words if w.lstrip("-").startswith(f"config.{match[1]}=")), f"--config.{match[1]}")
        raise UsageError(f"{given}: wants a value of type {type(old).__name__}, such as {old!r}") from e


def take_config(argv: list[str], default: Path) -> tuple[str, list[str]]:
    """The value of --config, `default` without one, and the command line without it.

    From here on a user's own modules are found beside the config file.
    """
    path = str(default)
    rest = []
    words = iter(argv)
    for word in words:
        if word in ("--config", "-config"):
            path = next(words, "")
        elif word.startswith(("--config=", "-config=")):
            path = word.partition("=")[2]
        elif word == "--":
            rest += [word, *words]
        else:
            rest.append(word)
    if not path:
        raise UsageError("--config wants a file, such as --config=configs/digits.py")
    # A user's own modules are found beside the config and in the working directory, behind those that are installed.
    sys.path += [str(Path(path.partition(":")[0]).resolve().parent), str(Path.cwd())]
    return path, rest


def take_record(command: str, rest: list[str]) -> tuple[Any, ConfigDict]:
    """The record that the first word names that is no flag, and its config; takes this word from them."""
    named = next((word for word in rest if not word.startswith("-")), "")
    if not named:
        raise UsageError(f"{command} wants {COMMANDS[command].files}")
    rest.remove(named)
    from imgclf_jax.run.record import Record

    record = Record.named(named)
    return record, record.config

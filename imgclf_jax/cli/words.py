"""Parsing of the command line: config file, keys, flags and files. Imports neither JAX nor TensorFlow."""

import itertools
import keyword
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from imgclf_jax import config as configs
from imgclf_jax.cli.flags import FLAGS
from imgclf_jax.cli.table import COMMANDS, commands_with
from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError, unknown


class UsageError(Exception):
    """A wrong command line: exit status 2."""


def take_flags(command: str, argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """Parses the flags of a command, and returns them with the remaining words: files and config keys.

    Raises UsageError for an invalid value, or a flag that the command does not take.
    """
    try:
        values = flags.FlagValues()
        for flag in COMMANDS[command].flags:
            COMMANDS[command].flag(flag).define(flag, values)
        values.set_gnu_getopt(True)  # flags may follow files
        rest = values(["launch.py", *argv], known_only=True)[1:]
    except flags.Error as e:
        raise UsageError(str(e)) from e
    for before, word in itertools.pairwise(["", *itertools.takewhile(lambda word: word != "--", rest)]):
        if re.fullmatch(r"--?config\.[^=]+", before) and re.match(r"-\.?\d", word):
            raise UsageError(f"{before} {word}: write {before}={word}")
        flag = word.lstrip("-").partition("=")[0]
        if word.startswith("-") and flag and flag != "config" and not flag.startswith("config."):
            raise _unknown_flag(flag, command)
    return values, rest


def join_booleans(words: list[str]) -> list[str]:
    """Writes `--config.KEY False` as `--config.KEY=False` for keys that are true or false: absl would set True."""
    joined: list[str] = []
    for i, word in enumerate(words):
        if word == "--":
            return [*joined, *words[i:]]
        if joined and _is_boolean(joined[-1]) and word.lower() in ("true", "false"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _is_boolean(word: str) -> bool:
    """Whether a word is --config.KEY, without a value, of a key that is true or false."""
    key = re.sub(r"^--?config\.", "", word)
    return key != word and isinstance(configs.KEYS.get(key, ("", ""))[0], bool)


def _values(words: Sequence[str]) -> set[int]:
    """The indices of words that are the values of the keys before them, as in `--config.seed 3`."""
    return {i + 1 for i, word in enumerate(words)
            if re.fullmatch(r"--?config\.[^=]+", word) and not _is_boolean(word)}  # fmt: skip


def find_files(words: Sequence[str]) -> list[str]:
    """The files among `words`: those that are neither flags nor values of keys, and all that follow `--`."""
    values, end = _values(words), words.index("--") if "--" in words else len(words)
    return [word for i, word in enumerate(words) if word != "--" and (
        i > end or (i not in values and (word == "-" or not word.startswith("-"))))]  # fmt: skip


def only_files(command: str, words: list[str]) -> list[str]:
    """Returns the files among `words`, for a command that takes files and no config."""
    if not words:
        raise UsageError(f"{command} needs {COMMANDS[command].files}")
    for word in itertools.takewhile(lambda word: word != "--", words):
        if word.lstrip("-").startswith("config") and word.startswith("-"):
            raise UsageError(f"{command} takes no config, but got {word!r}")
    return [word for word in words if word != "--"]


def _unknown_flag(flag: str, command: str) -> UsageError:
    if flag == "workdir" and "DIR" in COMMANDS[command].files:
        return UsageError(f"{command} takes the directories of runs without a flag, as in {command} runs/a")
    if flag in FLAGS:
        return UsageError(f"{command} does not take --{flag}; these commands do: {', '.join(commands_with(flag))}")
    if hint := configs.flag_for(flag):
        return UsageError(f"unknown flag --{flag}: {hint}")
    return UsageError(unknown("flag", flag, ("config", *COMMANDS[command].flags)))


def check_no_files(command: str, words: list[str]) -> None:
    """Raises UsageError for a file among the `words` of a command that takes none."""
    values = _values(words)
    for i, word in enumerate(words):
        if word == "--" or (i not in values and not word.startswith("-")):
            break
    else:
        return
    files = [word for word in words[i:] if word != "--"]
    if not files:
        return
    if i and word != "--" and _is_boolean(words[i - 1]):
        raise UsageError(f"{words[i - 1]} {word}: must be true or false")
    if files[0] in COMMANDS:
        raise UsageError(f"{command} takes no files, but got {files[0]!r}, which is a command: give one command, "
                         "before all flags")  # fmt: skip
    key, equals, value = files[0].partition("=")
    if equals and (hint := configs.flag_for(key)):
        raise UsageError(f"{command} takes no files, but got {files[0]!r}: {hint.replace('VALUE', value)}")
    if "workdir" in COMMANDS[command].flags:
        raise UsageError(f"{command} takes no files, but got {files[0]!r}; if that is a run, pass "
                         f"--workdir={files[0]}")  # fmt: skip
    raise UsageError(f"{command} takes no files, but got {files[0]!r}; did you forget '--'?")


def override(config: ConfigDict, words: list[str], command: str) -> list[str]:
    """Applies each --config.KEY=VALUE in `words` to `config`, and returns the other words."""
    for word in words:
        key = word.lstrip("-").partition("=")[0].removeprefix("config.")
        if word.startswith(("--config.", "-config.")) and key not in configs.flatten(config):
            name = key.removeprefix("data.eval.").removeprefix("data.extra.")
            if name == key or "." in name:
                raise UsageError(configs.explain_unknown(key))
            if key.startswith("data.extra."):  # a new extra stream
                with config.unlocked():
                    config.data.extra[name] = ""
                continue
            configs.check_set_name(name)
            if not name.isidentifier() or keyword.iskeyword(name):
                raise UsageError(
                    f"--config.data.eval.{name}: on the command line, a set's name consists of letters, digits and _, "
                    "and begins with a letter; use other names in the config file"
                )
            with config.unlocked():  # a new evaluation set
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
        # One of several may be good.
        of_key = [w for w in words if w.lstrip("-").startswith(f"config.{match[1]}=")]
        word = next((w for w in of_key if w.lstrip("-") in str(e)), f"--config.{match[1]}")
        raise UsageError(f"{word}: must be a value of type {type(old).__name__}, such as {old!r}") from e


@dataclass(frozen=True)
class CommandLine:
    """How the program was called, for a command that starts processes of its own."""

    program: list[str]  # starts this program in a new process
    config_file: str  # with its argument
    argv: list[str]  # all words
    words: list[str]  # those that are neither the command, its flags nor --config: keys and files
    environment: dict[str, str]  # at the start


def configs_folder() -> Path:
    """The folder of the configs that ship: in a clone `configs/`, in an installed package `imgclf_jax/configs/`."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def take_config(argv: list[str]) -> tuple[str, list[str]]:
    """Returns the file that --config names (default: digits) and the rest of the command line.

    A plain name such as `digits` is a config that ships, unless there is a file of that name. The user's own
    modules are searched in the config file's folder and the working directory.
    """
    path = str(configs_folder() / "digits.py")
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
        raise UsageError("--config needs a file or a name, such as --config=digits")
    name, colon, argument = path.partition(":")
    if not Path(name).is_file():
        ships = sorted(file.stem for file in configs_folder().glob("*.py"))
        if name in ships:
            path = f"{configs_folder() / name}.py{colon}{argument}"
        elif re.fullmatch(r"\w+", name):
            near = [f"{name}.py"] if Path(f"{name}.py").is_file() else [own for own in ships if name in own]
            raise UserError(unknown("config", name, ships, near))
        elif Path(name).stem in ships:  # what a clone has in configs/
            raise UserError(
                f"no config file {name!r}; the config that ships is --config={Path(name).stem}{colon}{argument}"
            )
    folder = Path(path.partition(":")[0]).resolve().parent
    spec.folders[:] = [str(folder), str(Path.cwd())]
    if folder != configs_folder().resolve():  # for what the config imports; last, to shadow no installed package
        sys.path.append(str(folder))
    return path, rest


def take_record(command: str, rest: list[str]) -> tuple[Any, ConfigDict]:
    """Removes the first file from `rest`, and returns the Record that it names and its config."""
    values = _values(rest)
    index = next((i for i, word in enumerate(rest) if i not in values and not word.startswith("-")), None)
    if index is None:
        raise UsageError(f"{command} needs {COMMANDS[command].files}")
    file = rest.pop(index)
    from imgclf_jax.run.record import Record

    record = Record.load(file)
    return record, record.config.copy_and_resolve_references()

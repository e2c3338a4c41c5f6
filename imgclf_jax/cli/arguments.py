"""The parser of the command line, with a sub-parser per command. Imports neither JAX nor TensorFlow."""

import argparse
import os
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from imgclf_jax import __version__
from imgclf_jax import config as configs
from imgclf_jax.cli.command_line import CommandLine, configs_folder, find_config
from imgclf_jax.cli.openers import from_record, without_config
from imgclf_jax.cli.table import COMMANDS, FLAGS
from imgclf_jax.core.errors import UsageError, unknown

_CONFIG = "a config file, or the name of one that ships (default: digits); its get_config gets ARG"
_OVERVIEW = """\
flags of most commands: --config=FILE.py[:ARG] --config.KEY=VALUE --workdir=DIR

exit status: 0 done, 1 failed, 2 wrong usage,
  75 stopped by a signal after saving a checkpoint: run the same command again,
  130 (SIGINT), 143 (SIGTERM) stopped by a signal with nothing to save

examples:
  {0}                                           train on digits
  {0} --config folder:photos --workdir runs/a   train on your own images
  {0} predict new.jpg --workdir runs/a          classify a new one
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build(program: str) -> argparse.ArgumentParser:
    """The parser; `program` is what help texts call the program."""
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(program, f"{program} [COMMAND] [flags] [FILE|DIR ...]", epilog=_OVERVIEW.format(program),
                     formatter_class=style, allow_abbrev=False)  # fmt: skip
    parser.add_argument("--version", action="version", version=f"imgclf_jax {__version__}")
    commands = parser.add_subparsers(title=f"commands ({program} COMMAND --help describes one)", dest="command",
                                     metavar="COMMAND")  # fmt: skip
    for name, command in COMMANDS.items():
        files = command.files and f" {command.files}{'' if command.opens is from_record else ' ...'}"
        described = (f"{command.summary[0].upper()}{command.summary[1:]}.", command.more)
        own = commands.add_parser(
            name, help=command.summary, usage=f"{program} {name}{files} [flags]", formatter_class=style,
            description="\n\n".join(textwrap.fill(text, 78) for text in described if text), allow_abbrev=False,
        )  # fmt: skip
        if command.opens not in (without_config, from_record):
            own.add_argument("--config", metavar="FILE.py[:ARG]", help=_CONFIG)
        if command.opens is not without_config:
            own.add_argument_group("config keys", f"--config.KEY=VALUE overrides a key: see `{program} config`.")
        for flag in command.flags:
            values = {"choices": command.formats, "default": command.formats[0]} if flag == "format" else {}
            own.add_argument(f"--{flag}", **FLAGS[flag] | values)
    return parser


def parse(argv: Sequence[str], program: str, command: list[str]) -> CommandLine:
    """Parses a command line. Raises UsageError for a wrong one, and SystemExit after printing help or the version.

    `program` is what help texts call the program, and `command` starts it in a new process.
    """
    environment, words = dict(os.environ), list(argv)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words.insert(0, "train")
    name = words[0]
    if name not in COMMANDS and not name.startswith("-"):
        raise UsageError(unknown("command", name, COMMANDS))
    end = words.index("--") if "--" in words else len(words)
    overrides, own = _take_overrides(words[:end])
    parsed, rest = build(program).parse_known_args(own)
    options = vars(parsed)
    config, workdir = options.pop("config", None), options.pop("workdir", "")
    for word in rest:
        if (word.startswith("-") and word != "-") or not COMMANDS[name].files:
            raise _refused(name, word)
    if overrides and COMMANDS[name].opens is without_config:
        raise UsageError(f"{name} takes no config, but got --config.{overrides[0][0]}")
    file, files = find_config("digits" if config is None else config), [*rest, *words[end + 1 :]]
    return CommandLine(options.pop("command"), command, file, config is not None, workdir, overrides, files, options,
                       environment)  # fmt: skip


def _take_overrides(words: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Splits words into the overrides `--config.KEY=VALUE` or `--config.KEY VALUE`, and the others."""
    overrides, others, remaining = [], [], iter(words)
    for word in remaining:
        if not word.startswith("--config."):
            others.append(word)
            continue
        key, equals, value = word.removeprefix("--config.").partition("=")
        value = value if equals else next(remaining, "--")
        if not equals and value.startswith("--"):
            raise UsageError(f"{word} needs a value: write {word}=VALUE")
        overrides.append((key, value))
    return overrides, others


def _refused(command: str, word: str) -> UsageError:
    """The error for a word that the command does not take, with what to write instead."""
    flag, _, value = word.partition("=")
    name, own = flag.lstrip("-"), COMMANDS[command].flags
    if name in configs.KEYS:
        return UsageError(f"{command} does not take {word!r}: it is a config key: write --config.{name}=VALUE")
    if name == "workdir" and COMMANDS[command].files:
        return UsageError(f"{command} takes directories without a flag: write {command} {value or 'DIR'}")
    if word.startswith("-"):
        return UsageError(unknown("flag", flag, [f"--{known}" for known in ("config", *own)]))
    file = word.partition(":")[0]
    key = "config" if file.endswith(".py") or (configs_folder() / f"{file}.py").is_file() else "workdir"
    hint = f": if that is a {key.replace('workdir', 'run')}, pass --{key}={word}" * (key in ("config", *own))
    return UsageError(f"{command} takes no files, but got {word!r}{hint}")

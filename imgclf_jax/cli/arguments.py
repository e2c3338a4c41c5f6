"""The parser of the command line, with a sub-parser per command. Imports neither JAX nor TensorFlow."""

import argparse
import os
import shutil
import textwrap
from typing import Any, NoReturn

from imgclf_jax import __version__
from imgclf_jax import config as configs
from imgclf_jax.cli.command_line import CommandLine, find_config
from imgclf_jax.cli.openers import from_record, from_run, from_run_or_weights, without_config
from imgclf_jax.cli.table import COMMANDS, FLAGS
from imgclf_jax.core.errors import UsageError, unknown

_CONFIG = ("a config file, or the name of one that ships (default: digits); its get_config gets ARG. mnist, "
           "fashion_mnist and others whose data come from TFDS need the extra tfds and, the first time, a "
           "network")  # fmt: skip
_OVERVIEW = """\
flags of most commands: --config=FILE.py[:ARG], --config.KEY=VALUE and --workdir=DIR

exit status: 0 done, 1 failed, 2 wrong usage,
             75 stopped by a signal after saving a checkpoint: run the same command again,
             130 (SIGINT), 143 (SIGTERM), 129 (SIGHUP) stopped by a signal with nothing to save

examples:
  {0}                                           train on scikit-learn's digits
  {0} --config folder:photos --workdir runs/a   train on your own images
  {0} predict new.jpg --workdir runs/a          classify a new one
"""


class _Help(argparse.HelpFormatter):
    """Fills paragraphs, and keeps indented lines, which can be copied."""

    def __init__(self, prog: str):
        width = max(40, min(120, shutil.get_terminal_size((120, 24)).columns))
        super().__init__(prog, max_help_position=34, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(line if line.startswith(" ") else textwrap.fill(line, width) for line in text.splitlines())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse ignores a full disk


def build(program: str) -> argparse.ArgumentParser:
    """The parser; `program` is what help texts call the program."""
    parser = _Parser(program, f"{program} [COMMAND] [flags] [FILE|DIR ...]", epilog=_OVERVIEW.format(program),
                     formatter_class=_Help, allow_abbrev=False)  # fmt: skip
    parser.add_argument("--version", action="version", version=f"imgclf_jax {__version__}")
    commands = parser.add_subparsers(title=f"commands ({program} COMMAND --help describes one)", dest="command",
                                     metavar="COMMAND")  # fmt: skip
    for name, command in COMMANDS.items():
        files = command.files and f" {command.files}{'' if command.opens is from_record else ' ...'}"
        examples = "".join(f"\n  {program} {name} {words}" for words in command.examples)
        own = commands.add_parser(
            name, help=command.summary, usage=f"{program} {name}{files} [flags]",
            description=f"{command.summary[0].upper()}{command.summary[1:]}.\n\n{command.more}",
            epilog=f"{program} --help lists the exit statuses.\n\nexamples:{examples}",
            formatter_class=_Help, allow_abbrev=False,
        )  # fmt: skip
        if command.opens is not without_config:
            shown = argparse.SUPPRESS if command.opens in (from_run, from_record) else _CONFIG
            own.add_argument("--config", metavar="FILE.py[:ARG]", help=shown)
            keys = f"--config.KEY=VALUE overrides a key; `{program} config` lists them all."
            if command.opens is from_run_or_weights:
                keys += " --config.init_from=PATH uses these weights and --config instead of a run."
            own.add_argument_group("config keys", keys)
        for flag in command.flags:
            values = {"choices": command.formats, "default": command.formats[0]} if flag == "format" else {}
            own.add_argument(f"--{flag}", **FLAGS[flag] | values)
    return parser


def parse(argv: list[str], program: str, command: list[str]) -> CommandLine:
    """Parses a command line. Raises UsageError for a wrong one, and SystemExit after printing help or the version.

    `program` is what help texts call the program, and `command` starts it in a new process.
    """
    environment, words = dict(os.environ), list(argv)
    if not words or "=" in words[0] or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words.insert(0, "train")
    if words[0] not in COMMANDS and not words[0].startswith("-"):
        raise UsageError(unknown("command", words[0], COMMANDS))
    end = words.index("--") if "--" in words else len(words)
    parsed, rest = build(program).parse_known_args(words[:end])
    options = vars(parsed)
    name, config, workdir = options.pop("command"), options.pop("config", None), options.pop("workdir", "")
    overrides, files = _split(name, rest)
    files += words[end + 1 :]
    if files and not COMMANDS[name].files:
        raise _refused(name, files[0])
    file = find_config("digits" if config is None else config)
    return CommandLine(name, command, argv, file, config is not None, workdir, overrides, files, options, environment)


def _split(command: str, words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Splits the words that are not flags of the command into overrides of config keys, and files."""
    overrides, files = [], []
    while words:
        word = words.pop(0)
        if word == "-" or not word.startswith("-"):
            files.append(word)
            continue
        if not word.startswith("--config.") or COMMANDS[command].opens is without_config:
            raise _refused(command, word)
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals and isinstance(configs.KEYS.get(key, ("",))[0], bool):
            value = words.pop(0) if words and words[0].lower() in ("true", "false") else "true"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise UsageError(f"{word} needs a value: write {word}=VALUE")
            value = words.pop(0)
        overrides.append((key, value))
    return overrides, files


def _refused(command: str, word: str) -> UsageError:
    """The error for a word that the command does not take, with what to write instead."""
    flag, (name, equals, value) = word.startswith("-"), word.lstrip("-").partition("=")
    own = COMMANDS[command].flags
    is_key = name in configs.KEYS and (flag or equals)
    hint = f"it is a config key: write --config.{name}={value or 'VALUE'}" if is_key else ""
    if not flag:
        if word in COMMANDS:
            hint = "it is a command: give one command, before all flags"
        elif not hint and "workdir" in own:
            hint = f"if that is a run, pass --workdir={word}"
        return UsageError(f"{command} takes no files, but got {word!r}" + (hint and f": {hint}"))
    if word.startswith("--config"):
        return UsageError(f"{command} takes no config, but got {word!r}")
    if name == "workdir" and name not in own:
        hint = f"{command} takes directories without a flag, as in {command} runs/a"
    elif word.startswith("--") and (users := [other for other in COMMANDS if name in COMMANDS[other].flags]):
        hint = f"{command} does not take it; these commands do: {', '.join(users)}"
    if hint:
        return UsageError(f"unknown flag {word!r}: {hint}")
    return UsageError(
        unknown("flag", word.partition("=")[0], [f"--{own}" for own in ("config", *COMMANDS[command].flags)])
    )

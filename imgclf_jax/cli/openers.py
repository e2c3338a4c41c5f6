"""Where a command's config comes from: one function for each origin. Imports neither JAX nor TensorFlow.

Each returns the config, with the keys that the command line sets, and what the command works on: a work directory, the
Record of a run, or None. It raises UserError if something that the config needs is missing.
"""

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.cli.command_line import CommandLine, configs_folder, override
from imgclf_jax.core import extras, paths, spec
from imgclf_jax.core.errors import UsageError, UserError, no_such
from imgclf_jax.core.text import printable

type Opener = Callable[[CommandLine], tuple[ConfigDict | None, Any]]


def without_config(line: CommandLine) -> tuple[None, None]:
    """For a command that only takes directories."""
    if not line.files:
        raise UsageError(f"{line.command} needs DIR, such as runs")
    for word in line.files:
        if "://" not in word and not os.path.isdir(word):
            raise UserError(f"{word} is not a directory; name work directories, or a folder that holds some")
    return None, None


def from_file_without_data(line: CommandLine) -> tuple[ConfigDict, str]:
    """The config file --config, whose data may be absent."""
    return _overridden(configs.load_file(line.config_file), line), _workdir(line)


def from_file(line: CommandLine) -> tuple[ConfigDict, str]:
    """The config file --config."""
    config, workdir = from_file_without_data(line)
    resumes = line.command == "train" and ("://" in workdir or Path(workdir, "checkpoints").is_dir())
    check_data(line.config_file, config, starts=not resumes)
    return config, workdir


def from_run(line: CommandLine) -> tuple[ConfigDict, str]:
    """The run in --workdir."""
    workdir = _workdir(line)
    file = paths.as_path(workdir) / "config.json"
    if not file.is_file() and not line.workdir:
        raise UserError(f"{line.command} needs a run: pass --workdir=DIR; the default, {file.absolute().parent}, holds "
                        "no run")  # fmt: skip
    _check_run(file, "train first, or pass the run's --workdir")
    if not line.workdir:
        tell(line, f"without --workdir: using the run in {workdir}")
    return _overridden(configs.from_json(paths.read(file), str(file)), line, workdir), workdir


def from_run_or_file(line: CommandLine) -> tuple[ConfigDict, str | None]:
    """The run in --workdir if that is given, else the config file."""
    return from_run(line) if line.workdir else (from_file(line)[0], None)


def from_run_or_weights(line: CommandLine) -> tuple[ConfigDict, str | None]:
    """The run in --workdir, or the config file if --config.init_from names weights for it."""
    if not any(key == "init_from" for key, _ in line.overrides):
        return from_run(line)
    has_run = line.workdir and (paths.as_path(line.workdir) / "config.json").is_file()
    if line.options["checkpoint"] or has_run:
        flag = "checkpoint" if line.options["checkpoint"] else "workdir"
        raise UsageError(f"{line.command} loads a run (--{flag}) or weights (--config.init_from), not both; drop "
                         "either")  # fmt: skip
    return from_file(line)[0], None


def from_record(line: CommandLine) -> tuple[ConfigDict, Any]:
    """The record of the run in a work directory, or of a bundle, which is the only file."""
    if len(line.files) != 1:
        raise UsageError(f"{line.command} takes one WORKDIR|BUNDLE, but got {line.files or 'none'}")
    if not os.path.isfile(line.files[0]):
        _check_run(paths.as_path(line.files[0]) / "config.json", "name the work directory of a run, or a bundle")
    from imgclf_jax.run.record import Record

    record = Record.load(line.files[0])
    return _overridden(record.config.copy_and_resolve_references(), line, str(record.path)), record


def tell(line: CommandLine, text: str) -> None:
    """Prints a line with the time to standard error, in process 0."""
    if not line.options.get("process_id"):
        print(f"{time.strftime('%H:%M:%S')} {printable(text)}", file=sys.stderr, flush=True)


def _workdir(line: CommandLine) -> str:
    return line.workdir or str(Path("runs", Path(line.config_file.partition(":")[0]).stem))


def _overridden(config: ConfigDict, line: CommandLine, run: str = "") -> ConfigDict:
    """Applies the overrides to a config. If that of a `run` replaces --config, says which keys differ."""
    override(config, line.overrides)
    configs.validate(config)
    if run and line.names_config:
        unused = configs.load_file(line.config_file)
        override(unused, line.overrides)
        if keys := [one.partition(":")[0] for one in configs.difference(config, unused)]:
            tell(line, f"{line.command} uses the config that the run in {run} has recorded, not --config="
                       f"{line.config_file}, which differs in {', '.join(keys)}; to change a key of the run's, pass "
                       "--config.KEY=VALUE")  # fmt: skip
    return config


def _check_run(file: Path, fix: str) -> None:
    if not file.is_file():
        where = file if paths.in_bucket(file) else file.absolute()
        raise UserError(f"{file.parent} holds no run: there is no {where}; {fix}")


_PATHS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "folder": ("directory", Path.is_dir), "distill": ("directory", Path.is_dir),
    "table": ("file", Path.is_file), "arrays": ("file", Path.is_file),
}  # fmt: skip


def check_data(file: str, config: ConfigDict, starts: bool) -> None:
    """Raises UserError if a path or package is missing that a config's sources, method or `init_from` name.

    `init_from` only counts if the run `starts`. `file` is the config file, with its argument. Addresses in buckets are
    checked later.
    """

    def check(what: str, kind: str, exists: Callable[[Path], bool], text: str) -> None:
        if "://" not in text and not exists(path := paths.expand_user(text)):
            raise _lacks_argument(file, text) or no_such(what, kind, path)

    for text in (config.data.source, config.method, *config.data.eval.values(), *config.data.extra.values()):
        for call in _calls(text):
            path = call.args[0] if call.args else call.kwargs.get("path")
            if call.name == "tfds":
                extras.require("tfds", str(call))
            elif call.name in _PATHS and isinstance(path, str):
                check(call.name, *_PATHS[call.name], path)
    if starts and config.init_from:
        check("init_from", "file or work directory", Path.exists, config.init_from)


def _calls(text: str) -> list[spec.Call]:
    """The calls of a spec, or of a split of a source, such as `folder('new')/train`; [] for other text."""
    for part in (text, text.rpartition("/")[0]):
        with contextlib.suppress(UserError):
            return spec.parse(part)
    return []


def _lacks_argument(file: str, default: str) -> UserError | None:
    """The error for a config without its argument, if `default` is the argument's default; else None."""
    pattern = rf"""^def get_config\((\w+)[^)]*=\s*["']{re.escape(default)}["']"""
    if ":" in file or not (argument := re.search(pattern, Path(file).read_text(encoding="utf-8"), re.MULTILINE)):
        return None
    name = Path(file).stem if Path(file).parent == configs_folder() else file
    return UserError(f"--config={name} takes an argument: write --config={name}:{argument[1].upper()}")

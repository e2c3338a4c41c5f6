"""Where a command's config comes from: one function for each origin. Imports neither JAX nor TensorFlow.

Each returns the config, with the command line's keys, and what the command works on: a work directory, Record or None.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.cli.command_line import CommandLine, override
from imgclf_jax.core import paths
from imgclf_jax.core.errors import UsageError, UserError
from imgclf_jax.weights import initial

type Opener = Callable[[CommandLine], tuple[ConfigDict | None, Any]]


def without_config(line: CommandLine) -> tuple[None, None]:
    """For a command that only takes directories."""
    if not line.files:
        raise UsageError(f"{line.command} needs DIR, such as runs")
    return None, None


def from_file(line: CommandLine) -> tuple[ConfigDict, str]:
    """The config file --config. A run in --workdir that skips unreadable images goes on skipping them."""
    config, workdir = configs.load_file(line.config_file), _workdir(line)
    file = paths.as_path(workdir) / "config.json"
    with contextlib.suppress(OSError, UserError):  # missing or damaged, which the commands on this run say
        if configs.from_json(paths.read(file), str(file)).data.unreadable == "skip":
            config.data.unreadable = "skip"
    return _overridden(config, line), workdir


def from_run(line: CommandLine) -> tuple[ConfigDict, str]:
    """The run in --workdir, whose config no --config may replace."""
    workdir = _workdir(line)
    file = paths.as_path(workdir) / "config.json"
    if not file.is_file():
        raise UserError(f"{workdir} holds no run: there is no {file}; train first, or pass the run's --workdir")
    if line.names_config and line.workdir:
        raise UsageError(f"{line.command} uses the config that the run in {workdir} has recorded: drop --config, "
                         "and change a key by --config.KEY=VALUE")  # fmt: skip
    return _overridden(configs.from_json(paths.read(file), str(file)), line), workdir


def from_run_or_file(line: CommandLine) -> tuple[ConfigDict, str | None]:
    """The run in --workdir if that is given, else the config file."""
    return from_run(line) if line.workdir else (from_file(line)[0], None)


def from_run_or_weights(line: CommandLine) -> tuple[ConfigDict, str | None]:
    """The run in --workdir, or the config file if --config.init_from names weights for it.

    Without --config, published weights make it an empty config, for ImageNet's classes.
    """
    given = dict(line.overrides)
    if "init_from" not in given:
        return from_run(line)
    if line.workdir or line.options["checkpoint"]:
        raise UsageError(f"{line.command} loads a run (--workdir, --checkpoint) or weights (--config.init_from), not "
                         "both; drop either")  # fmt: skip
    if line.names_config or not initial.parse(given["init_from"]).published:
        return from_file(line)[0], None
    if line.command in ("evaluate", "probe") and "data.source" not in given:
        raise UsageError(f"{line.command} needs labeled images: pass --config.data.source=\"folder('PHOTOS', "
                         "classes='imagenet')\"")  # fmt: skip
    config = configs.default_config()
    config.model = config.preprocess = ""
    config.data.source = "fake(1, (8, 8, 3), 'imagenet')"  # for the names alone
    return _overridden(config, line), None


def from_record(line: CommandLine) -> tuple[ConfigDict, Any]:
    """The record of the run in a work directory, or of a bundle, which is the only file."""
    if len(line.files) != 1:
        raise UsageError(f"{line.command} takes one WORKDIR|BUNDLE, but got {line.files or 'none'}")
    from imgclf_jax.run.record import Record

    record = Record.load(line.files[0])
    return _overridden(record.config.copy_and_resolve_references(), line), record


def _workdir(line: CommandLine) -> str:
    return line.workdir or str(Path("runs", Path(line.config_file.partition(":")[0]).stem))


def _overridden(config: ConfigDict, line: CommandLine) -> ConfigDict:
    override(config, line.overrides)
    initial.fill(config)
    configs.validate(config)
    return config

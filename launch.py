"""The command line: reads the flags, loads the config and runs a command. Help needs neither JAX nor TensorFlow.

Usage: launch.py [COMMAND] [--config=FILE.py[:ARG]] [--workdir=DIR] [--config.KEY=VALUE …] [FILE|DIR …]
"""

import importlib.util
import os
import sys

if __name__ == "__main__":
    # Installed packages come first: a jax.py next to this file must not shadow JAX.
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if folder != _here] + [_here]
    # But imgclf_jax is the package next to this file, even if the environment or PYTHONPATH names another clone.
    _package = os.path.join(_here, "imgclf_jax", "__init__.py")
    _spec = importlib.util.spec_from_file_location(
        "imgclf_jax", _package, submodule_search_locations=[os.path.dirname(_package)]
    )
    if os.path.isfile(_package) and _spec and _spec.loader:
        sys.modules["imgclf_jax"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["imgclf_jax"])
    from imgclf_jax.core import signals

    signals.install()

import contextlib
import importlib
import re
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.cli import table, words
from imgclf_jax.cli.table import COMMANDS
from imgclf_jax.cli.words import UsageError
from imgclf_jax.core.errors import UserError, reason, unknown
from imgclf_jax.core.text import prepare_streams, printable
from imgclf_jax.run import environment


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit status."""
    prepare_streams()
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except UsageError as e:
        print(f"error: {printable(str(e))}\nsee launch.py --help", file=sys.stderr)
        return 2
    except UserError as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python complains at exit
        return 1
    except OSError as e:
        message = f"{e.filename or _guess_file(e)}: {e.strerror or reason(e)}"
        print(f"error: {printable(message)}; fix the cause and run the same command again", file=sys.stderr)
        return 1


def _guess_file(error: OSError) -> str:
    """Names the cause of an error without a file name: standard output, if writing there fails the same way."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except OSError as e:
        if e.errno == error.errno:
            return "standard output"
    except ValueError:  # a stream without a file descriptor
        pass
    return "a file or the output"


def _run(argv: list[str]) -> int:
    if any(word in ("--help", "-help", "-h", "--helpfull", "--helpshort") for word in argv):
        print(table.command_help(argv[0]) if argv[0] in COMMANDS else table.overview(), end="")
        return 0
    command_line = list(argv)
    config_path, argv = words.take_config(argv, Path(__file__).parent / "configs" / "digits.py")
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    if name not in COMMANDS:
        raise UsageError(unknown("command", name, COMMANDS))
    command = COMMANDS[name]
    values, rest = words.take_flags(name, argv)
    given = {flag: values[flag].value for flag in command.flags}
    environment.prepare()  # reading a config or work directory below may import JAX
    if command.config_from == "none":
        files = words.only_files(name, rest)
        process_flags: list[Any] = [given.pop(flag) for flag in table.PROCESSES]
        agreed = {"command": name, **{f"--{flag}": value for flag, value in given.items()}, "files": files}
        with _join(agreed, *process_flags):
            status: int = _module(name).main(files, **given)
        return status
    workdir: Any = given.pop("workdir", "") or str(Path("runs", Path(config_path.partition(":")[0]).stem))
    config = configs.load_file(config_path)
    without_run = command.config_from == "run or file" and not values.workdir
    if command.config_from == "record":
        workdir, config = words.take_record(name, rest)
    elif command.config_from != "file" and not without_run:
        from imgclf_jax.run.workdir import Workdir

        without_run = command.config_from == "run or weights" and any(
            re.match(r"--?config\.init_from(=|$)", word) for word in rest
        )
        if not without_run:
            config = Workdir.named(workdir).load_config()  # a trained model keeps the config it was trained with
        elif given["checkpoint"] or (values.workdir and Workdir.named(workdir).config.is_file()):
            flag = "checkpoint" if given["checkpoint"] else "workdir"
            raise UsageError(f"{name} loads a run (--{flag}) or weights (--config.init_from), not both; drop either")
    files = words.override(config, rest, name)
    if files and command.config_from == "record":
        raise UsageError(f"{name} takes one {command.files}, but got {files[0]!r} too")
    if files and not command.files:
        raise UsageError(f"{name} takes no files, but got {files[0]!r}; did you forget '--'?")
    configs.validate(config)
    if name == "sweep":
        return _sweep(config_path, config, workdir, [word for word in rest if word != "--"], given)
    return _dispatch(name, config, None if without_run else workdir, given, files, command_line)


def _module(command: str) -> Any:
    return importlib.import_module(f"imgclf_jax.{table.module_of(command)}")


def _dispatch(
    name: str, config: ConfigDict, workdir: Any, given: dict[str, Any], files: list[str], command_line: list[str]
) -> int:
    """Runs a command. `workdir` is the path of a work directory, a Record, or None."""
    command = COMMANDS[name]
    if name == "config":
        current = configs.flatten(config)
        for key, (_, documentation) in configs.KEYS.items():
            print(f"{key} = {current[key]!r}\n    {documentation}")
        return 0
    if name == "train":
        given["profile"] = _parse_steps(given["profile"])

    environment.prepare(config.deterministic)  # before the first import of JAX
    if name == "dryrun":
        return _dryrun(config, Path(workdir or "runs"), **given)
    from imgclf_jax.cli import together
    from imgclf_jax.run.workdir import Workdir

    source = Workdir.named(workdir) if isinstance(workdir, str) else workdir
    with contextlib.ExitStack() as stack:
        process_flags = [given.pop(flag) for flag in table.PROCESSES] if command.distributed else None
        keys = {key: value for key, value in configs.flatten(config).items() if key not in configs.OF_THE_HOST}
        agreed = {"command": name, **keys, **{f"--{flag}": value for flag, value in given.items()}, "files": files}
        stack.enter_context(_join(agreed, *process_flags) if process_flags else together.alone())
        if "trust" in given and not given.pop("trust") and source:
            stack.enter_context(source.untrusted(command_line))
        takes_files = command.files and command.config_from != "record"
        status: int = _module(name).main(config, source, *([files] if takes_files else []), **given)
        return status


def _sweep(config_file: str, config: ConfigDict, workdir: str, rest: list[str], given: dict[str, Any]) -> int:
    """Runs `sweep` on CPU: each run is a separate process, and these get the accelerators."""
    before = dict(os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"
    from imgclf_jax.tools.sweep import command as sweep

    def with_settings(settings: dict[str, str]) -> ConfigDict:
        result = config.copy_and_resolve_references()
        try:
            words.override(result, [f"--config.{key}={text}" for key, text in settings.items()], "sweep")
        except UsageError as e:
            raise UserError(str(e)) from e
        configs.validate(result)
        return result

    command = [sys.executable, str(Path(__file__).resolve()), "train", f"--config={config_file}", *rest]
    try:
        return sweep.main(config, workdir, sweep.Launch(config_file, command, rest, before, with_settings), **given)
    finally:
        os.environ.pop("JAX_PLATFORMS")
        os.environ.update({name: value for name, value in before.items() if name == "JAX_PLATFORMS"})


def _join(
    agreed: dict[str, Any],
    coordinator: str,
    count: int | None,
    process: int | None,
    local_devices: str,
    heartbeat: int,
) -> contextlib.AbstractContextManager[None]:
    """Checks the flags of a multi-process run, and returns the context that joins it."""
    if count != 1 and any((coordinator, count, process is not None)):
        if not (coordinator and count and process is not None):
            raise UsageError("give --coordinator, --num_processes and --process_id together, to every process")
        if process >= count:
            raise UsageError(f"--process_id={process}: processes are numbered 0 to {count - 1}")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UsageError(f"--coordinator={coordinator}: must be HOST:PORT, such as node1:12345")
    if not re.fullmatch(r"(all|\d+(,\d+)*)?", local_devices):
        raise UsageError(f"--local_devices={local_devices}: must be 'all', or indices such as 0,1")
    from imgclf_jax.cli import together

    return together.join(agreed, coordinator, count, process, local_devices, heartbeat)


def _dryrun(config: ConfigDict, folder: Path, chips: str, shape: str, format: str, **given: int | None) -> int:
    from imgclf_jax.tools.dryrun import topology

    if not chips:
        raise UsageError(f"dryrun needs --chips, the chips to compile for; {topology.ALLOWED}")
    sides = shape.split(",") if shape else None
    if sides and not (len(sides) == 3 and all(re.fullmatch(r"[1-9]\d*", n) for n in sides)):
        raise UsageError(f"--shape={shape}: must be height, width and channels, such as 224,224,3")
    if given["classes"] and given["targets"]:
        raise UsageError("give --classes or --targets, not both: an example has a class or targets")
    parsed = topology.parse(chips)
    topology.prepare(parsed)
    from imgclf_jax.tools.dryrun import command as dryrun

    return dryrun.main(config, parsed, {"shape": sides and tuple(map(int, sides)), **given}, format, folder)


def _parse_steps(text: str) -> tuple[int, int] | None:
    """Parses '10:20' to (10, 20), and '' to None."""
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"--profile={text}: must be FIRST:LAST with FIRST < LAST, such as 10:20")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    try:
        _status = main(sys.argv[1:])
    except Exception:  # a bug, not a user's mistake
        traceback.print_exc()
        _status = 1
    if "imgclf_jax.core.processes" in sys.modules:
        sys.modules["imgclf_jax.core.processes"].end(_status)
    sys.exit(_status)

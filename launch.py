"""Flags to config to command. Prints help without importing JAX or TensorFlow.

Usage: launch.py [COMMAND] [--config=FILE.py[:ARG]] [--workdir=DIR] [--config.KEY=VALUE …] [FILE|DIR …]
"""

import importlib.util
import os
import sys

if __name__ == "__main__":
    # What is installed comes first: a file beside this one that is called jax.py is not JAX.
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if folder != _here] + [_here]
    # But the package is the one beside this file, whatever clone the environment or PYTHONPATH names.
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
    """Runs the command line `argv`, without the program's name; returns the exit status."""
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
    except BrokenPipeError:  # who read the output, such as `head`, wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at exit
        return 1
    except OSError as e:
        what = f"{e.filename or _unnamed(e)}: {e.strerror or reason(e)}"
        print(f"error: {printable(what)}; fix the cause and run the same command again", file=sys.stderr)
        return 1


def _unnamed(error: OSError) -> str:
    """What an error is about that names no file: standard output, if a line break there gives the same error."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except OSError as e:
        if e.errno == error.errno:
            return "standard output"
    except ValueError:  # a stream without a number
        pass
    return "a file or the output"


def _run(argv: list[str]) -> int:
    asks_help = any(a in ("--help", "-help", "-h", "--helpfull", "--helpshort") for a in argv)
    if asks_help and (named := [word for word in argv if word in COMMANDS]) and named[0] == argv[0]:
        print(table.help_of(argv[0]), end="")
        return 0
    if asks_help:
        print(table.overview(), end="")
        return 0
    said = list(argv)
    config_path, argv = words.take_config(argv, Path(__file__).parent / "configs" / "digits.py")
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    if name not in COMMANDS:
        raise UsageError(unknown("command", name, COMMANDS))
    command = COMMANDS[name]
    values, rest = words.take_flags(name, argv)
    given = {flag: values[flag].value for flag in command.flags}
    environment.prepare()  # a config or work directory that is read below may import JAX
    if command.of == "nothing":
        files = words.files_alone(name, rest)
        of_processes: list[Any] = [given.pop(flag) for flag in table.PROCESSES]
        alike = {"command": name, **{f"--{flag}": value for flag, value in given.items()}, "files": files}
        with _joined(alike, *of_processes):
            status: int = _module(name).main(files, **given)
        return status
    workdir: Any = given.pop("workdir", "") or str(Path("runs", Path(config_path.partition(":")[0]).stem))
    config = configs.load_file(config_path)
    without_run = command.of == "run or config" and not values.workdir
    if command.of == "record":
        workdir, config = words.take_record(name, rest)
    elif command.of != "config" and not without_run:
        from imgclf_jax.run.workdir import Workdir

        without_run = command.of == "run or weights" and any(
            re.match(r"--?config\.init_from(=|$)", word) for word in rest
        )
        if not without_run:
            config = Workdir.named(workdir).load_config()  # a trained model keeps the config that it was trained with
        elif given["checkpoint"] or (values.workdir and Workdir.named(workdir).config.is_file()):
            flag = "checkpoint" if given["checkpoint"] else "workdir"
            raise UsageError(f"{name}: --{flag} names a run's, --config.init_from weights without one; drop either")
    files = words.override(config, rest, name)
    if files and (not command.files or command.of == "record"):
        if command.of == "record":
            raise UsageError(f"{name} takes one {command.files}, found {files[0]!r} too")
        raise UsageError(f"{name} takes no files, found {files[0]!r}; did you forget '--'?")
    configs.validate(config)
    if name == "sweep":
        return _sweep(config_path, config, workdir, [word for word in rest if word != "--"], given)
    return _dispatch(name, config, None if without_run else workdir, given, files, said)


def _module(command: str) -> Any:
    return importlib.import_module(f"imgclf_jax.{table.module_of(command)}")


def _dispatch(
    name: str, config: ConfigDict, workdir: Any, given: dict[str, Any], files: list[str], said: list[str]
) -> int:
    """Runs a command. `workdir` is the name of a work directory, a Record, or None; `said` are all words."""
    command = COMMANDS[name]
    if name == "config":
        values_now = configs.flatten(config)
        for key, (_, documentation) in configs.KEYS.items():
            print(f"{key} = {values_now[key]!r}\n    {documentation}")
        return 0
    if name == "train":
        given["profile"] = _steps(given["profile"])

    # From here on JAX is wanted.
    environment.prepare(config.deterministic)
    if name == "dryrun":
        return _dryrun(config, Path(workdir or "runs"), **given)
    from imgclf_jax.cli import together
    from imgclf_jax.run.workdir import Workdir

    place = Workdir.named(workdir) if isinstance(workdir, str) else workdir
    with contextlib.ExitStack() as stack:
        of_processes = [given.pop(flag) for flag in table.PROCESSES] if command.in_processes else None
        keys = {key: value for key, value in configs.flatten(config).items() if key not in configs.OF_THE_HOST}
        alike = {"command": name, **keys, **{f"--{flag}": value for flag, value in given.items()}, "files": files}
        stack.enter_context(_joined(alike, *of_processes) if of_processes else together.alone())
        if "trust" in given and not given.pop("trust") and place:
            stack.enter_context(place.untrusted(said))
        takes_files = command.files and command.of != "record"
        status: int = _module(name).main(config, place, *([files] if takes_files else []), **given)
        return status


def _sweep(config_file: str, config: ConfigDict, workdir: str, rest: list[str], given: dict[str, Any]) -> int:
    """The command `sweep`, each run of which is a process of its own: accelerators are left to these."""
    before = dict(os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"
    from imgclf_jax.tools.sweep import command as sweep

    def configured(settings: dict[str, str]) -> ConfigDict:
        own = config.copy_and_resolve_references()
        try:
            words.override(own, [f"--config.{key}={text}" for key, text in settings.items()], "sweep")
        except UsageError as e:
            raise UserError(str(e)) from e
        configs.validate(own)
        return own

    command = [sys.executable, str(Path(__file__).resolve()), "train", f"--config={config_file}", *rest]
    try:
        return sweep.main(config, workdir, sweep.Launch(config_file, command, rest, before, configured), **given)
    finally:
        os.environ.pop("JAX_PLATFORMS")
        os.environ.update({name: value for name, value in before.items() if name == "JAX_PLATFORMS"})


def _joined(
    alike: dict[str, Any], coordinator: str, number: int | None, process: int | None, local_devices: str, heartbeat: int
) -> contextlib.AbstractContextManager[None]:
    """Inside, this process is one of those of the run, if there are several."""
    if number != 1 and any((coordinator, number, process is not None)):
        if not (coordinator and number and process is not None):
            raise UsageError("--coordinator, --num_processes and --process_id are given together, to every process")
        if process >= number:
            raise UsageError(f"--process_id={process}: the processes are numbered 0 to {number - 1}")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UsageError(f"--coordinator={coordinator}: wants HOST:PORT, such as node1:12345")
    if not re.fullmatch(r"(all|\d+(,\d+)*)?", local_devices):
        raise UsageError(f"--local_devices={local_devices}: wants 'all', or numbers such as 0,1")
    from imgclf_jax.cli import together

    return together.joined(alike, coordinator, number, process, local_devices, heartbeat)


def _dryrun(config: ConfigDict, folder: Path, chips: str, shape: str, format: str, **given: int | None) -> int:
    from imgclf_jax.tools.dryrun import topology

    if not chips:
        raise UsageError(f"dryrun wants --chips, the chips to compile for; {topology.ALLOWED}")
    sides = shape.split(",") if shape else None
    if sides and not (len(sides) == 3 and all(re.fullmatch(r"[1-9]\d*", n) for n in sides)):
        raise UsageError(f"--shape={shape}: wants height, width and channels, such as 224,224,3")
    if given["classes"] and given["targets"]:
        raise UsageError("--classes and --targets are both given; an example has a class or targets")
    parsed = topology.parse(chips)
    topology.prepare(parsed)
    from imgclf_jax.tools.dryrun import command as dryrun

    return dryrun.main(config, parsed, {"shape": sides and tuple(map(int, sides)), **given}, format, folder)


def _steps(text: str) -> tuple[int, int] | None:
    """'10:20' to (10, 20); None for the empty text."""
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"--profile={text}: wants FIRST:LAST, two steps, the first one smaller, such as 10:20")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    try:
        _status = main(sys.argv[1:])
    except Exception:  # which no person has caused
        traceback.print_exc()
        _status = 1
    if "imgclf_jax.core.processes" in sys.modules:
        sys.modules["imgclf_jax.core.processes"].end(_status)
    sys.exit(_status)

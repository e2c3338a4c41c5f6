"""The command line: reads the flags, loads the config and runs a command. Help needs neither JAX nor TensorFlow."""

import contextlib
import importlib
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ml_collections import ConfigDict

from imgclf_jax import __version__
from imgclf_jax import config as configs
from imgclf_jax.cli import early, table, words
from imgclf_jax.cli.table import COMMANDS
from imgclf_jax.cli.words import CommandLine, UsageError
from imgclf_jax.core import paths, processes, stopping
from imgclf_jax.core.errors import UserError, reason, unknown
from imgclf_jax.core.text import prepare_streams, printable
from imgclf_jax.core.typing import JsonObject, Value
from imgclf_jax.run import environment

_CLONE = Path(__file__).parents[2]  # of the repository; an installed package has no launch.py there


def console() -> NoReturn:
    """Runs the command line of the installed package, `imgclf` or `python -m imgclf_jax`, and exits."""
    name = Path(sys.argv[0]).name
    run_and_exit("python -m imgclf_jax" if name == "__main__.py" else name, [sys.executable, "-P", "-m", "imgclf_jax"])


def run_and_exit(program: str, command: Sequence[str]) -> NoReturn:
    """Runs `sys.argv` and exits with the status. `command` starts this program in a new process."""
    stopping.end_on_signals()
    try:
        status = main(sys.argv[1:], program, command)
    except SystemExit as e:  # by a signal
        status = int(e.code or 0)
    except Exception:  # a bug, not a user's mistake
        traceback.print_exc()
        status = 1
    if status in (0, stopping.STATUS_SAVED):
        if processes.count() > 1:
            stopping.ignore_signals()  # a launcher may send them when the first process ends
        sys.exit(status)  # with several processes, JAX's exit handler waits for the others
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if processes.count() > 1 and not processes.index():
        time.sleep(1.0)  # JAX's service ends with process 0: let the others report the same error first
    os._exit(status)  # a normal exit would wait for threads, such as a compilation


def main(argv: list[str], program: str = "launch.py", command: Sequence[str] = ()) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit status.

    `program` is what help texts call it, and `command` starts it in a new process.
    """
    prepare_streams()
    try:
        status = _run(argv, program, list(command) or [sys.executable, str(_CLONE / "launch.py")])
        sys.stdout.flush()
        return status
    except UsageError as e:
        print(f"error: {printable(str(e))}\nsee {program} --help", file=sys.stderr)
        return 2
    except UserError as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python complains at exit
        return 1
    except OSError as e:
        provenance = sys.modules.get("imgclf_jax.run.provenance")  # imported by now if the user's own code has run
        if provenance and provenance.raised_in_own_code(e):
            raise  # the user needs the traceback into their own code
        message = f"{e.filename or _guess_file(e)}: {e.strerror or reason(e)}"
        print(f"error: {printable(message)}; fix the cause and run the same command again", file=sys.stderr)
        return 1


def _guess_file(error: OSError) -> str:
    """Names the cause of an error without a file name: standard output, if writing there fails the same way."""
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"")
    except OSError as e:
        if e.errno == error.errno:
            return "standard output"
    except ValueError:  # a stream without a file descriptor
        pass
    return "a file or the output"


def _run(argv: list[str], program: str, program_command: list[str]) -> int:
    if any(word in ("--help", "-help", "-h", "--helpfull", "--helpshort") for word in argv):
        text = table.command_help(argv[0]) if argv[0] in COMMANDS else table.overview()
        print(text.replace("launch.py", program), end="")
        return 0
    if argv == ["--version"]:
        print(f"imgclf_jax {__version__}")
        return 0
    command_line, environment_before = list(argv), dict(os.environ)
    config_path, argv = words.take_config(argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    if name not in COMMANDS:
        key, equals, value = name.partition("=")
        hint = configs.flag_for(key).replace("VALUE", value) if equals else ""
        raise UsageError(f"unknown command {name!r}: {hint}" if hint else unknown("command", name, COMMANDS))
    command = COMMANDS[name]
    values, rest = words.take_flags(name, words.join_booleans(argv))
    options = {flag: values[flag].value for flag in command.flags}
    environment.prepare()  # reading a config or work directory below may import JAX
    if not command.files:
        words.check_no_files(name, rest)
    workdir: Any = options.pop("workdir", "") or str(Path("runs", Path(config_path.partition(":")[0]).stem))
    without_run = (command.config_from in ("file", "record", "none")
                   or (command.config_from == "run or file" and not values.workdir)
                   or (command.config_from == "run or weights"
                       and any(re.match(r"--?config\.init_from(=|$)", word) for word in rest)))  # fmt: skip
    if not without_run:
        early.check_run(name, workdir, "train first, or pass the run's --workdir" if values.workdir else "")
        if not values.workdir and not options.get("process_id"):
            print(f"{time.strftime('%H:%M:%S')} without --workdir: using the run in {printable(workdir)}",
                  file=sys.stderr)  # fmt: skip
    early.check(name, words.find_files(rest), options)
    if command.config_from == "none":
        files = words.only_files(name, rest)
        if not command.distributed:
            return int(_module(name).main(files, **options))
        process_flags: list[Any] = [options.pop(flag) for flag in table.PROCESSES]
        agreed = {"command": name, **{f"--{flag}": value for flag, value in options.items()}, "files": files}
        with _join(agreed, *process_flags):
            status: int = _module(name).main(files, **options)
        return status
    config = of_file = configs.load_file(config_path)
    if command.config_from == "record":
        workdir, config = words.take_record(name, rest)
    elif not without_run:
        from imgclf_jax.run.workdir import Workdir

        config = Workdir.from_text(workdir).load_config()  # a trained model keeps the config it was trained with
    elif command.config_from == "run or weights" and (options["checkpoint"] or (
            values.workdir and (paths.as_path(workdir) / "config.json").is_file())):  # fmt: skip
        flag = "checkpoint" if options["checkpoint"] else "workdir"
        raise UsageError(f"{name} loads a run (--{flag}) or weights (--config.init_from), not both; drop either")
    named = any(re.match(r"--?config(=|$)", word) for word in command_line)
    if config is not of_file and named and not options.get("process_id"):
        run = workdir if isinstance(workdir, str) else str(workdir.path)
        _tell_unused(name, config_path, run, of_file, config, rest)
    files = words.override(config, rest, name)
    if files and command.config_from == "record":
        raise UsageError(f"{name} takes one {command.files}, but got {files[0]!r} too")
    configs.validate(config)
    if config is of_file and name not in ("config", "dryrun", "sweep"):
        resumes = name == "train" and ("://" in workdir or Path(workdir, "checkpoints").is_dir())
        early.check_config(config_path, config, starts=not resumes)
    called = CommandLine(program_command, config_path, command_line, [w for w in rest if w != "--"], environment_before)
    source = None if without_run and command.config_from.startswith("run") else workdir
    return _dispatch(name, config, source, options, files, called)


def _tell_unused(name: str, path: str, run: str, of_file: ConfigDict, config: ConfigDict, words: Sequence[str]) -> None:
    """Says which keys of the file that --config names a command does not use, since it uses a run's own config."""
    given = {word.lstrip("-").partition("=")[0].removeprefix("config.") for word in words}
    given |= {"data.eval"} if any(key.startswith("data.eval.") for key in given) else set()
    if keys := [line.partition(":")[0] for line in configs.difference(config, of_file, sorted(given))]:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        print(f"{time.strftime('%H:%M:%S')} {name} uses the config that the run in {printable(run)} has recorded, "
              f"not --config={printable(path)}, which differs in {', '.join(keys[:3])}{more}; to change a key of the "
              "run's, pass --config.KEY=VALUE", file=sys.stderr)  # fmt: skip


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"imgclf_jax.{table.module_of(command)}")


def _dispatch(
    name: str, config: ConfigDict, workdir: Any, options: dict[str, Value], files: list[str], called: CommandLine
) -> int:
    """Runs a command. `workdir` is the path of a work directory, a Record, or None."""
    command = COMMANDS[name]
    if name == "config":
        current = configs.flatten(config)
        for key, (_, documentation) in configs.KEYS.items():
            print(f"{key} = {current[key]!r}\n    {documentation}")
        return 0
    if name == "train":
        options["profile"] = _parse_steps(options["profile"])

    environment.prepare(config.deterministic)  # before the first import of JAX
    if name == "train" and "jax" not in sys.modules and not options["process_id"]:  # which takes seconds to import
        told = f"{time.strftime('%H:%M:%S')} training {Path(called.config_file).name} in {printable(workdir)}"
        print(told, file=sys.stderr, flush=True)
    from imgclf_jax.cli import distributed
    from imgclf_jax.run.workdir import Workdir

    source = Workdir.from_text(workdir) if isinstance(workdir, str) else workdir
    with contextlib.ExitStack() as stack:
        process_flags = [options.pop(flag) for flag in table.PROCESSES] if command.distributed else None
        keys = {key: value for key, value in configs.flatten(config).items() if key not in configs.HOST_KEYS}
        agreed = {"command": name, **keys, **{f"--{flag}": value for flag, value in options.items()}, "files": files}
        stack.enter_context(_join(agreed, *process_flags) if process_flags else distributed.alone())
        if "trust" in options and not options.pop("trust") and source:
            stack.enter_context(source.untrusted(called.argv))
        more: list[Any] = [files] if command.files and command.config_from != "record" else []
        more += [called] if command.needs_command_line else []
        return int(_module(name).main(config, source, *more, **options))


def _join(
    agreed: JsonObject, coordinator: str, count: int | None, process: int | None, local_devices: str, heartbeat: int,
) -> contextlib.AbstractContextManager[None]:  # fmt: skip
    """Checks the flags of a multi-process run, and returns the context that joins it."""
    if count != 1 and any((coordinator, count, process is not None)):
        if not (coordinator and count and process is not None):
            raise UsageError("give --coordinator, --num_processes and --process_id together, to every process")
        if process >= count:
            raise UsageError(f"--process_id={process}: processes are numbered 0 to {count - 1}")
        if not re.fullmatch(r".+:\d+", coordinator) or int(coordinator.rpartition(":")[2]) > 65535:
            raise UsageError(f"--coordinator={coordinator}: must be HOST:PORT, such as node1:12345")
    if not re.fullmatch(r"(all|\d+(,\d+)*)?", local_devices):
        raise UsageError(f"--local_devices={local_devices}: must be 'all', or indices such as 0,1")
    from imgclf_jax.cli import distributed

    return distributed.join(agreed, coordinator, count, process, local_devices, heartbeat)


def _parse_steps(text: str) -> tuple[int, int] | None:
    """Parses '10:20' to (10, 20), and '' to None."""
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"--profile={text}: must be FIRST:LAST with FIRST < LAST, such as 10:20")
    return int(match[1]), int(match[2])

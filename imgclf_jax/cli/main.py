"""The command line: reads the flags, loads the config and runs a command. Help needs neither JAX nor TensorFlow."""

import contextlib
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.cli import arguments
from imgclf_jax.cli.command_line import CommandLine
from imgclf_jax.cli.openers import from_record
from imgclf_jax.cli.table import COMMANDS, PROCESSES
from imgclf_jax.core import extras, processes, stopping
from imgclf_jax.core.errors import UsageError, UserError, reason
from imgclf_jax.core.text import prepare_streams, printable
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
        stopping.ignore_signals()  # a launcher may send them when the first process ends
        sys.exit(status)  # with several processes, JAX's exit handler waits for the others
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if processes.count() > 1 and not processes.index():
        time.sleep(1.0)  # JAX's service ends with process 0: let the others report the same error first
    os._exit(status)  # a normal exit would wait for threads, such as a compilation


def main(argv: Sequence[str], program: str = "launch.py", command: Sequence[str] = ()) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit status.

    `program` is what help texts call it, and `command` starts it in a new process.
    """
    prepare_streams()
    try:
        status = _run(arguments.parse(argv, program, list(command) or [sys.executable, str(_CLONE / "launch.py")]))
        sys.stdout.flush()
        return status
    except SystemExit as e:  # after printing help or the version
        return int(e.code or 0)
    except UserError as e:
        wrong_usage = isinstance(e, UsageError)
        print(f"error: {printable(str(e))}" + f"\nsee {program} --help" * wrong_usage, file=sys.stderr)
        return 2 if wrong_usage else 1
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python complains at exit
        return 1
    except OSError as e:
        message = f"{e.filename or 'standard output or a file'}: {e.strerror or reason(e)}"
        print(f"error: {printable(message)}; fix the cause and run the same command again", file=sys.stderr)
        return 1


def _run(line: CommandLine) -> int:
    command = COMMANDS[line.command]
    environment.prepare()  # a config may import JAX
    if command.extra:
        extras.require(command.extra, line.command)
    if command.before_jax:
        module, _, function = command.before_jax.partition(":")
        getattr(importlib.import_module(f"imgclf_jax.{module}"), function)(files=line.files, **line.options)
    config, source = command.opens(line)
    if config and line.command == "config":
        current = configs.flatten(config)
        for key, (_, documentation) in configs.KEYS.items():
            print(f"{key} = {current[key]!r}\n    {documentation}")
        return 0
    if config:
        environment.prepare(config.deterministic)
    return _dispatch(line, config, source)


def _dispatch(line: CommandLine, config: ConfigDict | None, source: Any) -> int:
    """Runs a command. `source` is the path of a work directory, a Record, or None."""
    from imgclf_jax.cli import distributed
    from imgclf_jax.core import terminal
    from imgclf_jax.run.workdir import Workdir

    command, options = COMMANDS[line.command], dict(line.options)
    source = Workdir(source) if isinstance(source, str) else source
    process_flags = [options.pop(flag) for flag in PROCESSES if flag in options]
    keys = configs.flatten(config) if config else {}
    agreed = {key: value for key, value in keys.items() if key not in configs.HOST_KEYS}
    agreed |= {"command": line.command, "files": line.files} | {f"--{flag}": value for flag, value in options.items()}
    with contextlib.ExitStack() as stack:
        if config:
            if process_flags:
                processes.start(*process_flags)
            stack.enter_context(distributed.started(agreed, counted=not line.options.get("local_devices")))
        else:  # such as `status`, beside a run that holds the devices
            terminal.setup_logging()
        if config and "trust" in options and not options.pop("trust") and source:
            stack.enter_context(Workdir(source.path).untrusted())
        more: list[Any] = [config, source] if config else []
        more += [line.files] if command.files and command.opens is not from_record else []
        more += [line] if command.needs_command_line else []
        return int(importlib.import_module(f"imgclf_jax.{command.module}").main(*more, **options))

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
from imgclf_jax.cli import arguments, early, table
from imgclf_jax.cli.command_line import CommandLine
from imgclf_jax.cli.openers import from_record, tell
from imgclf_jax.cli.table import COMMANDS
from imgclf_jax.core import processes, stopping
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
        if provenance and provenance.raised_in_user_code(e):
            raise  # the user needs the traceback into their own code
        message = f"{e.filename or 'standard output or a file'}: {e.strerror or reason(e)}"
        print(f"error: {printable(message)}; fix the cause and run the same command again", file=sys.stderr)
        return 1


def _run(argv: list[str], program: str, command: list[str]) -> int:
    try:
        line = arguments.parse(argv, program, command)
    except SystemExit as e:  # after printing help or the version
        return int(e.code or 0)
    environment.prepare()  # a config may import JAX
    early.check(line.command, line.files, line.options)
    return _dispatch(line, *COMMANDS[line.command].opens(line))


def _dispatch(line: CommandLine, config: ConfigDict | None, source: Any) -> int:
    """Runs a command. `source` is the path of a work directory, a Record, or None."""
    command, options = COMMANDS[line.command], dict(line.options)
    if line.command == "config":
        return _print_keys(config)
    if config:
        environment.prepare(config.deterministic)  # before the first import of JAX
    if line.command == "train" and "jax" not in sys.modules:  # which takes seconds to import
        tell(line, f"training {Path(line.config_file).name} in {source}")
    from imgclf_jax.cli import distributed
    from imgclf_jax.run.workdir import Workdir

    source = Workdir.from_text(source) if isinstance(source, str) else source
    with contextlib.ExitStack() as stack:
        if command.distributed:
            process_flags = [options.pop(flag) for flag in table.PROCESSES]
            keys = {key: value for key, value in configs.flatten(config or ConfigDict()).items()
                    if key not in configs.HOST_KEYS}  # fmt: skip
            flags = {f"--{flag}": value for flag, value in options.items()}
            agreed = {"command": line.command, **keys, **flags, "files": line.files}
            stack.enter_context(distributed.join(agreed, *process_flags))
        else:
            stack.enter_context(distributed.alone())
        if config and "trust" in options and not options.pop("trust") and source:
            stack.enter_context(source.untrusted(line.argv))
        more: list[Any] = [config, source] if config else []
        more += [line.files] if command.files and command.opens is not from_record else []
        more += [line] if command.needs_command_line else []
        return int(importlib.import_module(f"imgclf_jax.{command.module}").main(*more, **options))


def _print_keys(config: ConfigDict) -> int:
    current = configs.flatten(config)
    for key, (_, documentation) in configs.KEYS.items():
        print(f"{key} = {current[key]!r}\n    {documentation}")
    return 0

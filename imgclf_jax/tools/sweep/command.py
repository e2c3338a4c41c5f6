"""The command `sweep`: trains a run for each combination of values, each in a separate process."""

import collections
import contextlib
import logging
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.cli.command_line import CommandLine, override
from imgclf_jax.core import paths, terminal
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.stopping import SIGNALS, STATUS_SAVED, stopping
from imgclf_jax.core.text import printable
from imgclf_jax.recipe import check_names
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.sweep import plan as sweep_plan
from imgclf_jax.tools.sweep.plan import Run, Settings
from imgclf_jax.train.display import program

log = logging.getLogger(__name__)

_BY_SIGNAL = {STATUS_SAVED, *(128 + number for number in SIGNALS), *(-number for number in SIGNALS)}
_PAUSE = 0.1  # seconds between polls of the processes


def main(
    config: ConfigDict, workdir: Workdir, called: CommandLine, sweep: Sequence[str], jobs: int, print: bool
) -> int:
    """Trains each run of the plan in its directory below `workdir`, up to `jobs` at once.

    - `sweep` lists the values of keys (see `sweep_plan.parse`).
    - `print` prints the commands without starting runs.

    Returns 0 if all runs finish, 1 if one fails, and 75 if a signal stops one. Raises UserError for an invalid plan,
    before the first run starts.
    """
    terminal.setup_logging()
    folder = workdir.path
    if paths.in_bucket(folder) and not print:
        raise UserError(f"{folder} is in a bucket, which cannot hold the runs' logs; add --print, and run the commands")
    if workdir.config.is_file():
        raise UserError(f"{folder} is a run itself (it has a config.json); pass another --workdir for the sweep")
    settings = sweep_plan.combine(sweep_plan.load_sweep(called.config_file), sweep)
    runs = sweep_plan.make(settings, lambda own: _make_config(config, own))
    if print:
        _print_commands(called, folder, runs)
        return 0
    with workdir.held():
        return _train_all(called, folder, runs, jobs)


def _make_config(config: ConfigDict, settings: Settings) -> ConfigDict:
    config = config.copy_and_resolve_references()
    try:
        override(config, settings.items())
        configs.validate(config)
        check_names(config)
    except UserError as e:
        run = ", ".join(f"{key}={text}" for key, text in settings.items())
        raise UserError(f"no run was started: {e} (in the run {run}; values of --sweep are separated by ';')") from e
    return config


def _command(called: CommandLine, folder: Path, run: Run) -> list[str]:
    keys = [f"--config.{key}={value}" for key, value in (*called.overrides, *run.settings.items())]
    return [*called.program, "train", f"--config={called.config_file}", *keys, f"--workdir={folder / run.name}"]


def _print_commands(called: CommandLine, folder: Path, runs: Sequence[Run]) -> None:
    """Prints one command per run, with paths relative to the working directory if they are below it."""
    here = Path.cwd()
    for run in runs:
        program, script, *rest = _command(called, folder, run)
        short = [str(p.relative_to(here)) if p.is_relative_to(here) else str(p) for p in map(Path, (program, script))]
        print(shlex.join([*short, *rest]))


def _train_all(called: CommandLine, folder: Path, runs: Sequence[Run], jobs: int) -> int:
    """Trains the runs that are not done yet, and returns the sweep's exit status."""
    outcomes: dict[str, str] = {}  # by run: "done", "done before", "stopped" or "failed"
    active: dict[Run, tuple[subprocess.Popen[bytes], float]] = {}  # with the time when it began
    width = max(len(run.name) for run in runs)

    def report(run: Run, outcome: str, details: str = "") -> None:
        outcomes[run.name] = outcome
        terminal.print_text(f"{run.name:<{width}}  {outcome:<11}  {details}".rstrip())

    todo = collections.deque[Run]()
    for run in runs:
        if _is_done(run, Workdir(folder / run.name)):
            report(run, "done before")
        else:
            todo.append(run)

    def terminate() -> None:
        for process, _ in active.values():  # which only an error leaves
            process.terminate()

    with stopping() as stop, contextlib.ExitStack() as at_end:
        at_end.callback(terminate)
        sent = ""  # the signal passed on to the runs
        while active or (todo and not stop()):
            if stop() and not sent:
                sent = stop()
                for process, _ in active.values():
                    process.send_signal(signal.Signals[sent])
            while todo and not stop() and len(active) < jobs:
                run = todo.popleft()
                active[run] = _start(_command(called, folder, run), folder, run, called.environment), time.monotonic()
            for run, (process, began) in list(active.items()):
                if (status := process.poll()) is not None:
                    del active[run]
                    kind = "done" if status == 0 else "stopped" if status in _BY_SIGNAL else "failed"
                    error = _find_error(status, folder / f"{run.name}.log") if kind == "failed" else ""
                    report(run, kind, f"{time.monotonic() - began:.1f} s  {error}")
            time.sleep(_PAUSE)
        sent = sent or stop()
    done, failed = (sum(one.startswith(kind) for one in outcomes.values()) for kind in ("done", "failed"))
    place = printable(str(folder))
    print(f"{done} of {len(runs)} runs are done; compare them:\n  {program()} compare {shlex.quote(place)}")
    if sent:
        log.warning("%s: stopped; run the same command to continue", sent)
    if sent or (not failed and done < len(runs)):
        return STATUS_SAVED
    return 1 if failed else 0


def _is_done(run: Run, workdir: Workdir) -> bool:
    """Whether the run's files show that it has finished with this config."""
    try:
        return workdir.is_done() and not configs.difference(
            workdir.load_config(), run.config, configs.free_keys(run.config)
        )
    except UserError:
        return False


def _start(command: Sequence[str], folder: Path, run: Run, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    paths.make_folder(folder / run.name)
    with paths.open_regular(folder / f"{run.name}.log", "a", "utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
        )


def _find_error(status: int, file: Path) -> str:
    """Returns why a run failed: the last error in its log, or the signal that killed it."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; see {file}"
    lines = paths.read(file).decode(errors="replace").rpartition("\n$ ")[2].splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return f"{errors[-1] if errors else f'exit status {status}'}; see {file}"

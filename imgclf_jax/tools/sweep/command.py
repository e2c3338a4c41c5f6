"""The command `sweep`: trains a run for each combination of values, each in a separate process."""

import collections
import contextlib
import dataclasses
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.cli.command_line import CommandLine, override
from imgclf_jax.core import paths, terminal
from imgclf_jax.core.errors import UsageError, UserError
from imgclf_jax.core.stopping import SIGNALS, STATUS_SAVED, stopping
from imgclf_jax.core.text import printable
from imgclf_jax.recipe import check_names
from imgclf_jax.run import lock
from imgclf_jax.run.ranking import main_metric
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.sweep import plan as sweep_plan
from imgclf_jax.tools.sweep import status
from imgclf_jax.tools.sweep.plan import Run, Settings
from imgclf_jax.train.display import program

log = logging.getLogger(__name__)

_BY_SIGNAL = {128 + number for number in SIGNALS} | {-number for number in SIGNALS}
_PAUSE = 0.1  # seconds between polls of the processes


@dataclasses.dataclass
class _Job:
    """A running process."""

    run: Run
    process: subprocess.Popen[bytes]
    began: float


def main(
    config: ConfigDict, workdir: Workdir, called: CommandLine, sweep: Sequence[str], jobs: int, print: bool
) -> int:
    """Trains each run of the plan in its directory below `workdir`, up to `jobs` at once.

    - `sweep` lists the values of keys (see `sweep_plan.parse`).
    - `print` prints the commands without starting runs.

    Returns 0 if all runs finish, 1 if one fails, and 75 if a signal stops one. Raises UserError for an invalid plan,
    before the first run starts.
    """
    try:
        return _train_all(config, workdir, called, sweep, jobs, print)
    finally:
        os.environ.pop("JAX_PLATFORMS", None)
        os.environ.update({name: value for name, value in called.environment.items() if name == "JAX_PLATFORMS"})


def _train_all(
    config: ConfigDict, workdir: Workdir, called: CommandLine, sweep: Sequence[str], jobs: int, print: bool
) -> int:
    terminal.setup_logging()
    folder = workdir.path
    if paths.in_bucket(folder) and not print:
        raise UserError(f"{folder} is in a bucket, which cannot hold the runs' logs; add --print, and run the commands")
    if workdir.config.is_file():
        raise UserError(f"{folder} is a run itself (it has a config.json); pass another --workdir for the sweep")
    settings = sweep_plan.combine(sweep_plan.load_sweep(called.config_file), sweep)
    keys = list(dict.fromkeys(key for own in settings for key in own))
    _check_overrides([key for key, _ in called.overrides], keys)
    with workdir.held() if not paths.in_bucket(folder) else contextlib.nullcontext():
        file = folder / sweep_plan.FILE
        recorded = sweep_plan.load(file, config, set(keys))
        runs = sweep_plan.make(settings, lambda own: _make_config(config, own), recorded)
        sweep_plan.save(file, called.config_file, config, keys, runs, recorded)
        if print:
            _print_commands(called, folder, runs)
            return 0
        return _Sweep(called, folder, runs, jobs).run()


def _check_overrides(fixed: Sequence[str], keys: Sequence[str]) -> None:
    """Raises UserError for a key that is set twice for all runs, or both set and swept."""
    for key, times in collections.Counter(fixed).items():
        if times > 1:
            raise UserError(f"--config.{key} is given {times} times; sweep several values with --sweep '{key}=VALUE; "
                            "VALUE'")  # fmt: skip
        if key in keys:
            raise UserError(f"{key} is both set by --config.{key} and swept; drop one of them")


def _make_config(config: ConfigDict, settings: Settings) -> ConfigDict:
    config = config.copy_and_resolve_references()
    try:
        override(config, settings.items())
        configs.validate(config)
        check_names(config)
    except (UserError, UsageError) as e:
        run = ", ".join(f"{key}={text}" for key, text in settings.items())
        raise UserError(f"no run was started: {e} (in the run {run}; values of --sweep are separated by ';')") from e
    return config


def _command(called: CommandLine, folder: Path, run: Run) -> list[str]:
    keys = [f"--config.{key}={value}" for key, value in called.overrides]
    train = [*called.program, "train", f"--config={called.config_file}", *keys]
    return [*train, *run.words, f"--workdir={folder / run.name}"]


def _print_commands(called: CommandLine, folder: Path, runs: Sequence[Run]) -> None:
    """Prints one command per run, with paths relative to the working directory if they are below it."""
    here = Path.cwd()
    for run in runs:
        program, script, *rest = _command(called, folder, run)
        short = [str(p.relative_to(here)) if p.is_relative_to(here) else str(p) for p in map(Path, (program, script))]
        print(shlex.join([*short, *rest]))


class _Sweep:
    """The runs of a sweep and their processes."""

    def __init__(self, called: CommandLine, folder: Path, runs: Sequence[Run], jobs: int):
        self._called, self._folder, self._jobs = called, folder, jobs
        self._runs = runs
        self._width = max(len(run.name) for run in runs)
        self._active: list[_Job] = []
        self._elsewhere: list[Run] = []  # that another process trains, for example one that a killed sweep left behind
        self._began, self._parts = 0.0, dict[str, float]()  # of the runs that do not train now, what is done, 0 to 1
        self._parts_before: dict[str, float] = {}  # the same when the sweep began
        self._outcomes: dict[str, str] = {}  # by run: "done", "done before", "stopped" or "failed"

    def run(self) -> int:
        """Trains the runs that are not done yet, and returns the sweep's exit status."""
        todo = collections.deque[Run]()
        for run in self._runs:
            if self._is_done(run):
                self._report(run, "done before")
            else:
                todo.append(run)
        for run in [run for run in todo if self._is_held(run)]:
            todo.remove(run)
            self._wait_for(run)
        self._began = time.monotonic()
        self._parts = {run.name: 1.0 if run.name in self._outcomes else status.read_progress(
            run.config, self._workdir(run)).part for run in self._runs}  # fmt: skip
        self._parts_before = dict(self._parts)
        with stopping() as stop, self._stopped_with_errors(), terminal.showing(self._describe):
            sent = ""  # the signal passed on to the runs
            while self._active or (not stop() and (todo or self._elsewhere)):
                if stop() and not sent:
                    sent = stop()
                    for job in self._active:
                        job.process.send_signal(signal.Signals[sent])
                for run in [run for run in self._elsewhere if not self._is_held(run)]:
                    self._elsewhere.remove(run)
                    todo.appendleft(run)
                while todo and not stop() and len(self._active) + len(self._elsewhere) < self._jobs:
                    run = todo.popleft()
                    if self._is_done(run):  # by another process
                        self._report(run, "done")
                    else:
                        self._active.append(self._start(run))
                for job in [job for job in self._active if job.process.poll() is not None]:
                    self._active.remove(job)
                    self._end(job)
                time.sleep(_PAUSE)
            sent = sent or stop()
        return self._finish(sent)

    def _describe(self) -> str:
        """How far the sweep is, for the line that shows it."""
        runs = [job.run for job in list(self._active)]
        active = [(run.name, run.config, status.read_progress(run.config, self._workdir(run))) for run in runs]
        if not active:
            return ""
        parts = self._parts | {name: progress.part for name, _, progress in active}
        done = sum(outcome.startswith("done") for outcome in list(self._outcomes.values()))
        seconds = time.monotonic() - self._began
        left = status.time_left(sum(parts.values()), sum(self._parts_before.values()), len(parts), seconds)
        return status.describe(active, done, len(self._runs), left)

    def _workdir(self, run: Run) -> Workdir:
        return Workdir(self._folder / run.name)

    def _log(self, run: Run) -> Path:
        return self._folder / f"{run.name}.log"

    def _is_held(self, run: Run) -> bool:
        return lock.is_held(self._workdir(run).path / "lock")

    def _wait_for(self, run: Run) -> None:
        """Starts the run once the process that trains it has ended, instead of failing on its lock."""
        self._elsewhere.append(run)
        log.warning("another process is training %s: waiting for it", run.name)

    def _is_done(self, run: Run) -> bool:
        """Whether the run's files show that it has finished with this config."""
        workdir = self._workdir(run)
        try:
            if configs.difference(workdir.load_config(), run.config, configs.free_keys(run.config)):
                return False
            return workdir.is_done(workdir.total_steps(run.config))
        except UserError:
            return False

    def _start(self, run: Run) -> _Job:
        command = _command(self._called, self._folder, run)
        paths.refuse_link(self._workdir(run).path)
        with paths.open_regular(self._log(run), "a", "utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=self._called.environment
            )
        return _Job(run, process, time.monotonic())

    def _end(self, job: _Job) -> None:
        status, seconds = job.process.returncode, time.monotonic() - job.began
        if status == 0:
            self._report(job.run, "done", seconds)
        elif status == STATUS_SAVED or status in _BY_SIGNAL:
            self._report(job.run, "stopped", seconds)
        elif self._is_held(job.run):  # by a process that was still importing when the sweep began
            self._wait_for(job.run)
        else:
            self._report(job.run, "failed", seconds, _find_error(status, self._log(job.run)))

    def _report(self, run: Run, outcome: str, seconds: float | None = None, error: str = "") -> None:
        """Prints a line: the run, its outcome, its duration, and its main metric or the error."""
        self._outcomes[run.name] = outcome
        self._parts[run.name] = 1.0 if outcome.startswith("done") else self._parts.get(run.name, 0.0)
        duration = "" if seconds is None else f"{seconds:.1f} s"
        detail = _main_metric(run.config, self._workdir(run)) if outcome.startswith("done") else error
        row = status.row(run.name, self._width, f"{outcome:<11}  {duration:>9}  {detail}".rstrip(), terminal.columns())
        for line in row:
            terminal.print_text(line)

    @contextlib.contextmanager
    def _stopped_with_errors(self) -> Iterator[None]:
        """A context in which an error also stops the runs."""
        try:
            yield
        except BaseException:
            for job in self._active:
                job.process.terminate()
            raise

    def _finish(self, signal_name: str) -> int:
        """Prints a summary, and returns the exit status."""
        done = sum(outcome.startswith("done") for outcome in self._outcomes.values())
        failed = [run for run in self._runs if self._outcomes.get(run.name) == "failed"]
        print(f"{done} of {len(self._runs)} runs are done; see {printable(str(self._folder))}")
        results = [(run.name, run.config, status.result(self._workdir(run))) for run in self._runs
                   if self._outcomes.get(run.name, "").startswith("done")]  # fmt: skip
        if lines := status.ranking(results, columns=terminal.columns()):
            print(*map(printable, lines), sep="\n")
            folder = shlex.quote(printable(str(self._folder)))
            print(f"compare them, over seeds and with tests:\n  {program()} compare {folder}")
        if failed:
            print(f"{len(failed)} failed; their logs:", *(f"  {self._log(run)}" for run in failed), sep="\n",
                  file=sys.stderr)  # fmt: skip
        if signal_name:
            log.warning("%s: stopped; run the same command to continue", signal_name)
        if signal_name or (not failed and done < len(self._runs)):
            return STATUS_SAVED
        return 1 if failed else 0


def _find_error(status: int, file: Path) -> str:
    """Returns why a run failed: the last error in its log, or the signal that killed it."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; see {file.name}"
    with contextlib.suppress(OSError):
        lines = paths.read(file).decode(errors="replace").splitlines()
        begun = max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=0)
        if errors := [line for line in lines[begun:] if line.startswith("error: ")]:
            return errors[-1]
    return f"exit status {status}; see {file.name}"


def _main_metric(config: ConfigDict, workdir: Workdir) -> str:
    """Formats the metric that the run is ranked by; "" without a result."""
    metrics = status.result(workdir)
    found = main_metric(config.checkpoint.best, config.data.eval, metrics)
    return f"{found[0]} {status.format_metric(metrics, found[0])}" if found else ""

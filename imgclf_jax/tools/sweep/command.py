"""The command `sweep`: a run for each combination of values, in processes of their own."""

import collections
import contextlib
import dataclasses
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.cli.words import CommandLine, UsageError, override
from imgclf_jax.core import places, signals
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable
from imgclf_jax.metrics import parse_best
from imgclf_jax.recipe import check_names
from imgclf_jax.run import lock, terminal
from imgclf_jax.run.provenance import load_data_info, read_json
from imgclf_jax.run.record import MAIN_METRICS
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.sweep import plan as sweep_plan
from imgclf_jax.tools.sweep.plan import Run, Settings

log = logging.getLogger(__name__)

STOPPED = 75  # of a run: a signal came, a checkpoint is saved; of the sweep: run the same command again
_BY_SIGNAL = {128 + number for number in signals.SIGNALS} | {-number for number in signals.SIGNALS}
_PAUSE = 0.1  # seconds between two looks at the processes


@dataclasses.dataclass
class _Job:
    """A run that goes on."""

    run: Run
    process: subprocess.Popen[bytes]
    began: float


def main(
    config: ConfigDict, workdir: Workdir, called: CommandLine, sweep: Sequence[str], jobs: int, print: bool
) -> int:
    """Trains each run of the plan in its directory below `workdir`, up to `jobs` at once.

    `sweep` holds values of keys, see `sweep_plan.parse`. With `print` the commands are printed, and no run begins.
    Returns 0 when all are done, 1 if one failed, and 75 if one was stopped by a signal. Raises UserError for a plan
    with anything wrong in it, before the first run begins.
    """
    try:
        return _train_all(config, workdir, called, sweep, jobs, print)
    finally:
        os.environ.pop("JAX_PLATFORMS", None)
        os.environ.update({name: value for name, value in called.environment.items() if name == "JAX_PLATFORMS"})


def _train_all(
    config: ConfigDict, place: Workdir, called: CommandLine, sweep: Sequence[str], jobs: int, print: bool
) -> int:
    terminal.setup_logging()
    workdir = place.path
    if places.in_bucket(place.path) and not print:
        raise UserError(f"{workdir} is in a bucket, where the runs' logs cannot be; add --print, and run the commands")
    if place.config.is_file():
        raise UserError(f"{workdir} holds a run itself (config.json); pass another --workdir for the sweep")
    settings = sweep_plan.combine(configs.load_sweep(called.config_file), sweep)
    keys = list(dict.fromkeys(key for own in settings for key in own))
    _check_words(called.words, keys)
    with place.held() if not places.in_bucket(place.path) else contextlib.nullcontext():
        file = place.path / sweep_plan.FILE
        recorded = sweep_plan.load(file, config, set(keys))
        runs = sweep_plan.make(settings, lambda own: _checked(config, own), recorded)
        sweep_plan.save(file, called.config_file, config, keys, runs, recorded)
        if print:
            _print_commands(called, place.path, runs)
            return 0
        return _Sweep(called, place.path, runs, jobs).go()


def _check_words(words: Sequence[str], keys: Sequence[str]) -> None:
    """Raises UserError for a key that is set twice for all runs, and for one that is set so and swept too."""
    fixed = [match[1] for word in words if (match := re.match(r"--?config\.([^=]+)", word))]
    for key, times in collections.Counter(fixed).items():
        if times > 1:
            raise UserError(f"--config.{key} is given {times} times; several values are --sweep '{key}=VALUE; VALUE'")
        if key in keys:
            raise UserError(f"{key} is set by --config.{key} and swept too; leave out one of them")


def _checked(config: ConfigDict, settings: Settings) -> ConfigDict:
    config = config.copy_and_resolve_references()
    try:
        override(config, [f"--config.{key}={text}" for key, text in settings.items()], "sweep")
        configs.validate(config)
        check_names(config)
    except (UserError, UsageError) as e:
        whole = ", ".join(f"{key}={text}" for key, text in settings.items())
        raise UserError(f"no run was started: {e} (in the run {whole}; values of --sweep are separated by ';')") from e
    return config


def _command(called: CommandLine, folder: Path, run: Run) -> list[str]:
    train = [*called.program, "train", f"--config={called.config_file}", *called.words]
    return [*train, *run.words, f"--workdir={folder / run.name}"]


def _print_commands(called: CommandLine, folder: Path, runs: Sequence[Run]) -> None:
    """A line a run, for a shell in this directory: what lies in it is named from here."""
    here = Path.cwd()
    for run in runs:
        program, script, *rest = _command(called, folder, run)
        short = [str(p.relative_to(here)) if p.is_relative_to(here) else str(p) for p in map(Path, (program, script))]
        print(shlex.join([*short, *rest]))


class _Sweep:
    """The runs of a sweep, and the processes in which they go on."""

    def __init__(self, called: CommandLine, folder: Path, runs: Sequence[Run], jobs: int):
        self._called, self._folder, self._jobs = called, folder, jobs
        self._runs = runs
        self._width = max(len(run.name) for run in runs)
        self._active: list[_Job] = []
        self._ended: dict[str, str] = {}  # how each run ended, by name

    def go(self) -> int:
        """Runs what is not done yet; the sweep's exit status."""
        todo = collections.deque[Run]()
        for run in self._runs:
            if self._is_done(run):
                self._report(run, "done before")
            else:
                todo.append(run)
        # Processes that a killed sweep left behind go on: to wait for them loses nothing.
        elsewhere = [run for run in todo if lock.is_held(self._place(run).path / "lock")]
        for run in elsewhere:
            todo.remove(run)
            log.warning("%s is being trained by another process: waiting for it", run.name)
        with signals.noted(self._losing) as stop, self._killed_at_the_end():
            told = ""
            while self._active or (not stop() and (todo or elsewhere)):
                if stop() and not told:
                    told = stop()
                    for job in self._active:
                        job.process.send_signal(signals.number(told))
                for run in [run for run in elsewhere if not lock.is_held(self._place(run).path / "lock")]:
                    elsewhere.remove(run)
                    todo.appendleft(run)
                while todo and not stop() and len(self._active) + len(elsewhere) < self._jobs:
                    run = todo.popleft()
                    if self._is_done(run):  # another process has ended it
                        self._report(run, "done")
                    else:
                        self._active.append(self._start(run))
                for job in [job for job in self._active if job.process.poll() is not None]:
                    self._active.remove(job)
                    self._end(job)
                time.sleep(_PAUSE)
            told = told or stop()
        return self._summary(told)

    def _place(self, run: Run) -> Workdir:
        return Workdir(self._folder / run.name)

    def _log(self, run: Run) -> Path:
        return self._folder / f"{run.name}.log"

    def _is_done(self, run: Run) -> bool:
        """Whether the run has ended with this config, as its files say."""
        place = self._place(run)
        try:
            if configs.difference(place.load_config(), run.config, configs.FREE_KEYS):
                return False
            examples = load_data_info(place.provenance).train_examples
            return place.is_done(configs.steps(run.config.total, "total", examples, run.config.batch_size))
        except UserError:
            return False

    def _start(self, run: Run) -> _Job:
        command = _command(self._called, self._folder, run)
        with self._log(run).open("a", encoding="utf-8") as file:
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
        elif status == STOPPED or status in _BY_SIGNAL:
            self._report(job.run, "stopped", seconds)
        else:
            self._report(job.run, "failed", seconds, _why(status, self._log(job.run)))

    def _report(self, run: Run, how: str, seconds: float | None = None, why: str = "") -> None:
        """A line: the run, how it ended, its seconds in this process, and its main metric or what went wrong."""
        self._ended[run.name] = how
        took = "" if seconds is None else f"{seconds:.1f} s"
        what = _main_metric(run.config, self._place(run)) if how.startswith("done") else why
        print(f"{run.name:<{self._width}}  {how:<11}  {took:>9}  {printable(what)}".rstrip(), flush=True)

    def _losing(self) -> str:
        return f"the steps of {len(self._active)} runs since their latest checkpoints"

    @contextlib.contextmanager
    def _killed_at_the_end(self) -> Iterator[None]:
        """While inside, an end at once ends the runs as well, and so does an error."""

        def kill(*_: object) -> None:
            for job in self._active:
                job.process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))

        signals.before_exit.append(kill)
        try:
            yield
        except BaseException:
            for job in self._active:
                job.process.terminate()
            raise
        finally:
            signals.before_exit.remove(kill)

    def _summary(self, told: str) -> int:
        done = sum(how.startswith("done") for how in self._ended.values())
        failed = [run for run in self._runs if self._ended.get(run.name) == "failed"]
        print(f"{done} of {len(self._runs)} runs are done; see {printable(str(self._folder))}")
        if failed:
            print(f"{len(failed)} failed; their logs:", *(f"  {self._log(run)}" for run in failed), sep="\n",
                  file=sys.stderr)  # fmt: skip
        if told:
            log.warning("%s: stopped; run the same command to go on", told)
        if told or (not failed and done < len(self._runs)):
            return STOPPED
        return 1 if failed else 0


def _why(status: int, file: Path) -> str:
    """What a run failed by: the last error in its log, or the signal that killed it."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; see {file.name}"
    with contextlib.suppress(OSError):
        lines = file.read_bytes().decode(errors="replace").splitlines()
        begun = max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=0)
        if errors := [line for line in lines[begun:] if line.startswith("error: ")]:
            return errors[-1]
    return f"exit status {status}; see {file.name}"


def _main_metric(config: ConfigDict, place: Workdir) -> str:
    """The metric that checkpoints are chosen by, or else what the task is ranked by, on the first evaluation set."""
    best = config.checkpoint.best
    group, _, kind = parse_best(best)[0].partition("/") if best else (next(iter(config.data.eval), ""), "", "")
    try:
        found = read_json(place.result)[group]
        kind = kind or next(own for own in MAIN_METRICS if own in found)
        deviation = f" ± {found[f'{kind}_std']:.4f}" if f"{kind}_std" in found else ""
        return f"{group}/{kind} {found[kind]:.4f}{deviation}"
    except (UserError, KeyError, TypeError, ValueError, StopIteration):
        return ""

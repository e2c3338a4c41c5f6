"""Trains in several processes."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import jax
from resume_check import ROOT

from imgclf_jax.core.errors import UserError

LONGEST = 600  # seconds that a process may take to end
PATHS = (str(Path(__file__).parent),)  # of modules that a config may name
SMALL = ("--config.data.source=fake(96, (8, 8, 3), 4)", "--config.preprocess=decode(3)", "--config.batch_size=32",
         "--config.tensorboard=False", "--config.data.eval.test=test[:37]")  # fmt: skip
LONG = (*SMALL, "--config.model=mlp(widths=(32,))", "--config.total=5000 steps", "--config.log_every=10 steps",
        "--config.checkpoint_every=50 steps", "--config.eval_every=190 steps",
        "--config.checkpoint.best=test/accuracy")  # fmt: skip


def find_port() -> int:
    """A free port that the system gives to nobody by itself."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("localhost", port))
            return port


def start(
    workdir: Path,
    processes: int,
    devices: int | tuple[int, ...],
    overrides: tuple[str, ...],
    last: tuple[str, ...] = (),
    heartbeat: int = 10,
) -> list[subprocess.Popen]:
    """The processes of a run, on so many virtual CPU devices each; what they say goes to `workdir`.log.NUMBER.

    `devices` is one number for every process, or one for each. The flags in `last` are given to the last process alone.
    """
    workdir.parent.mkdir(parents=True, exist_ok=True)
    started, port = [], find_port()
    for number in range(processes):
        words = [sys.executable, str(ROOT / "launch.py"), "train", f"--workdir={workdir}", *overrides]
        if processes > 1:
            words += [f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={number}",
                      f"--heartbeat={heartbeat}"]  # fmt: skip
        words += last if number == processes - 1 else ()
        with open(f"{workdir}.log.{number}", "a") as log:
            here = devices if isinstance(devices, int) else devices[number]
            environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(here), "JAX_PLATFORMS": "cpu",
                           "PYTHONPATH": os.pathsep.join(PATHS)}  # fmt: skip
            started.append(subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT, env=environment))
    return started


def fails_in_process_1() -> NoReturn:
    """A model of which one process alone raises an error."""
    if jax.process_index():
        raise UserError("this host lacks a file")
    time.sleep(LONGEST)
    raise AssertionError("the other process has ended this one")


def end(started: list[subprocess.Popen]) -> list[int]:
    """Waits for all; their exit statuses. Kills all and raises TimeoutExpired if one takes too long."""
    try:
        return [process.wait(LONGEST) for process in started]
    finally:
        for process in started:
            process.kill()


def run(workdir: Path, processes: int, devices: int | tuple[int, ...], overrides: tuple[str, ...]) -> None:
    """Lets a run go to its end."""
    statuses = end(start(workdir, processes, devices, overrides))
    assert set(statuses) == {0}, f"exit statuses {statuses}; see {workdir}.log.*"


def records(workdir: Path, key: str) -> dict[int, float]:
    """The values of a metric, by step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}

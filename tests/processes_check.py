"""Trains in several processes, and signals and kills them; the checks give what is wrong, [] if nothing is."""

import collections
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from resume_check import ROOT, outcome

from imgclf_jax.core.errors import UserError

LONGEST = 600  # seconds that a process may take to end
PATHS = (str(Path(__file__).parent),)  # of modules that a config may name
SMALL = ("--config.data.source=fake(96, (8, 8, 3), 4)", "--config.preprocess=decode(3)", "--config.batch_size=32",
         "--config.tensorboard=False", "--config.data.eval.test=test[:37]")  # fmt: skip
STATISTICS = (*SMALL, "--config.model=smooth_net:Smooth()", "--config.accumulate=2",
              "--config.optimizer=sgd(momentum=0.9)", "--config.schedule=constant(0.05)",
              "--config.total=100 steps", "--config.log_every=1 steps", "--config.eval_every=50 steps",
              "--config.checkpoint_every=")  # fmt: skip
LONG = (*SMALL, "--config.model=mlp(widths=(32,))", "--config.total=5000 steps", "--config.log_every=10 steps",
        "--config.checkpoint_every=50 steps", "--config.eval_every=190 steps",
        "--config.checkpoint.best=test/accuracy")  # fmt: skip


def start(
    workdir: Path,
    processes: int,
    devices: int,
    overrides: tuple[str, ...],
    last: tuple[str, ...] = (),
    heartbeat: int = 10,
) -> list[subprocess.Popen]:
    """The processes of a run, on so many virtual CPU devices each; what they say goes to `workdir`.log.NUMBER.

    The flags in `last` are given to the last process alone.
    """
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(processes):
        words = [sys.executable, str(ROOT / "launch.py"), "train", f"--workdir={workdir}", *overrides]
        if processes > 1:
            words += [f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={number}",
                      f"--heartbeat={heartbeat}"]  # fmt: skip
        words += last if number == processes - 1 else ()
        with open(f"{workdir}.log.{number}", "a") as log:
            environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu",
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


def run(workdir: Path, processes: int, devices: int, overrides: tuple[str, ...]) -> None:
    """Lets a run go to its end."""
    statuses = end(start(workdir, processes, devices, overrides))
    assert set(statuses) == {0}, f"exit statuses {statuses}; see {workdir}.log.*"


def records(workdir: Path, key: str) -> dict[int, float]:
    """The values of a metric, by step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


def disturb(workdir: Path, overrides: tuple[str, ...], number: signal.Signals, rng: random.Random) -> list[int]:
    """Starts two processes and, at a random moment of training, sends a signal to one or, if it kills, perhaps both.

    Gives the exit statuses.
    """
    log = Path(f"{workdir}.log.0")
    before = log.stat().st_size if log.exists() else 0
    started = start(workdir, 2, 2, overrides)
    early = rng.random() < 0.4  # while programs are compiled, and in the first step
    said = b"training on " if early else b"  train  "
    while said not in (log.read_bytes()[before:] if log.exists() else b"") and started[0].poll() is None:
        time.sleep(0.02)
    time.sleep(rng.uniform(0.0, 3.0 if early else 1.0))
    for process in rng.choice(([0], [1], [0, 1]) if number == signal.SIGKILL else ([0], [1])):
        started[process].send_signal(number)
    return end(started)


def compare(folder: Path) -> list[str]:
    """What differs between numbers of devices and of processes."""
    ways = {"1 device": (1, 1), "2 devices": (1, 2), "8 devices": (1, 8), "2 processes": (2, 2), "4 processes": (4, 2)}
    wrong = []
    for way, (processes, devices) in ways.items():
        workdir = folder / way.replace(" ", "-")
        run(workdir, processes, devices, STATISTICS)
        losses, examples = records(workdir, "train/loss"), records(workdir, "test/examples")
        if way == "1 device":
            expected = losses
        furthest = max(abs(losses[step] / expected[step] - 1) for step in expected)
        print(f"{way}: {len(losses)} losses, at most {furthest:.1e} from those of one device, "
              f"evaluated {set(examples.values())}", flush=True)  # fmt: skip
        if losses.keys() != expected.keys() or furthest > 1e-5 or set(examples.values()) != {37}:
            wrong.append(way)
    return wrong


def disturb_often(folder: Path, number: signal.Signals, times: int, rng: random.Random) -> list[str]:
    """What is wrong after a run of two processes was disturbed so many times."""
    whole, workdir = folder / "whole", folder / number.name
    if not (whole / "result.json").exists():
        run(whole, 2, 2, LONG)
    seen: collections.Counter[str] = collections.Counter()
    for _ in range(times):
        statuses = disturb(workdir, LONG, number, rng)
        if statuses == [0, 0]:
            seen["ended before"] += 1
            break
        seen[str(statuses)] += 1
    run(workdir, 2, 2, LONG)
    same = outcome(workdir) == outcome(whole)
    print(f"{number.name} x {times}: exit statuses {dict(seen)}, {'equal' if same else 'DIFFERENT'}", flush=True)
    allowed = {"[75, 75]", "[143, 143]"} if number == signal.SIGTERM else {"[-9, 1]", "[1, -9]", "[-9, -9]"}
    return [number.name] if not same or not set(seen) <= allowed else []


def elastic(folder: Path) -> list[str]:
    """What is wrong with a run of which four processes do the first third, one the second, and four the last."""
    whole, workdir = folder / "two", folder / "elastic"
    run(whole, 2, 2, LONG)
    for processes, devices, steps in ((4, 2, 1000), (1, 1, 2000), (4, 2, 5000)):
        started = start(workdir, processes, devices, LONG)
        metrics = workdir / "metrics.jsonl"
        while steps < 5000 and not (metrics.exists() and max(records(workdir, "train/loss"), default=0) >= steps):
            time.sleep(0.05)
        if steps < 5000:
            started[-1].send_signal(signal.SIGTERM)
        print(f"{processes} processes: {end(started)}", flush=True)
    a, b = records(whole, "train/loss"), records(workdir, "train/loss")
    furthest = max(abs(a[step] - b[step]) for step in a)
    print(f"elastic: {len(b)} losses, at most {furthest:.1e} from those of two processes", flush=True)
    return ["elastic"] if a.keys() != b.keys() or not np.isclose(furthest, 0, atol=1e-4) else []

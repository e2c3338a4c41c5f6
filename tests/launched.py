"""Starts training in processes, kills them, and reads what a run leaves; parts that the configs of such runs name."""

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.kinds import by_example
from imgclf_jax.data.source import Source
from imgclf_jax.models.layers import Conv, mean_pool
from imgclf_jax.models.norms import BatchNorm

ROOT = Path(__file__).parent.parent
LONGEST = 600  # seconds that a process may take to end
TIMINGS = ("train/images_per_second", "train/input_wait")
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


def environment(devices: int = 1) -> dict[str, str]:
    """That of a process on so many CPU devices, whose config may name the modules beside this one."""
    return {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(__file__).parent)}  # fmt: skip


def start(
    workdir: Path, overrides: tuple[str, ...], processes: int = 1, devices: int | tuple[int, ...] = 1,
    last: tuple[str, ...] = (), heartbeat: int = 10, log: Path | None = None,
) -> list[subprocess.Popen]:  # fmt: skip
    """The processes of a run; what they say goes to `log`.log.NUMBER, by default beside the work directory.

    `devices` is one number for every process, or one for each; `last` are flags of the last process alone.
    """
    workdir.parent.mkdir(parents=True, exist_ok=True)
    started, port = [], find_port()
    for number in range(processes):
        words = [sys.executable, str(ROOT / "launch.py"), "train", f"--workdir={workdir}", *overrides]
        if processes > 1:
            words += [f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={number}",
                      f"--heartbeat={heartbeat}"]  # fmt: skip
        words += last if number == processes - 1 else ()
        own = environment(devices if isinstance(devices, int) else devices[number])
        with open(f"{log or workdir}.log.{number}", "a") as file:
            started.append(subprocess.Popen(words, stdout=file, stderr=file, cwd=ROOT, env=own, start_new_session=True))
    return started


def end(started: list[subprocess.Popen]) -> list[int]:
    """Waits for all; their exit statuses. Kills all and raises TimeoutExpired if one takes too long."""
    try:
        return [process.wait(LONGEST) for process in started]
    finally:
        for process in started:
            process.kill()


def finish(workdir: Path, overrides: tuple[str, ...], processes: int = 1, devices: int | tuple[int, ...] = 1) -> None:
    """Lets a run go to its end."""
    statuses = end(start(workdir, overrides, processes, devices))
    assert set(statuses) == {0}, f"exit statuses {statuses}; see {workdir}.log.*"


def kill_repeatedly(workdir: Path, overrides: tuple[str, ...], kills: int, rng: random.Random) -> None:
    """Kills `kills` processes one after the other, in start-up, in training or in a save, then lets one finish."""
    for number in range(kills):
        before = size(workdir / "metrics.jsonl")
        [process] = start(workdir, overrides)
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0.1, 8.0))  # imports, data, restoring, compiling
        else:
            while process.poll() is None and size(workdir / "metrics.jsonl") <= before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.4))
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"the run ended after {number} kills; make it longer"
    finish(workdir, overrides)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def records(workdir: Path, key: str) -> dict[int, float]:
    """The values of a metric, by step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


def outcome(workdir: Path) -> tuple[str, list[dict]]:
    """The digest of the final parameters, and every record of metrics but for timings."""
    result = json.loads((workdir / "result.json").read_text())
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return result["params_sha256"], [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


class Smooth(nn.Module):
    """Convolution, batch norm and tanh, twice: near zero, rounding would decide whether a ReLU has a gradient."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i, width in enumerate((8, 16)):
            x = Conv(width, 3, strides=2, use_bias=False, name=f"conv{i}")(x)
            x = nn.tanh(BatchNorm(name=f"norm{i}")(x, train))
        return mean_pool(x)


@by_example
def poison(key, images, ids, epochs, which=((3, 1),), value=float("nan")):
    """Multiplies the images of the (id, epoch) pairs `which` by `value`, as a damaged file or a bad transfer might."""
    bad = jnp.zeros(ids.shape, bool)
    for example, epoch in which:
        bad |= (ids == example) & (epochs == epoch)
    return jnp.where(bad[:, None, None, None], images * jnp.float32(value), images)


def fails_in_process_1() -> NoReturn:
    """A model of which one process alone raises an error."""
    if jax.process_index():
        raise UserError("this host lacks a file")
    time.sleep(LONGEST)
    raise AssertionError("the other process has ended this one")


def dies_in_process_1(source: Source) -> Callable[..., np.ndarray]:
    """A sampler that one process does not live to see."""
    if jax.process_index():
        os.kill(os.getpid(), signal.SIGKILL)
    return lambda key, positions, n: positions % n


def writes_little_in_process_0(source: Source) -> Callable[..., np.ndarray]:
    """A sampler after which one process can write no large file."""
    if not jax.process_index():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    return lambda key, positions, n: positions % n

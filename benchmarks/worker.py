"""A process for each variant: `Worker` starts it, asks it for measurements, and stops it."""

import importlib
import importlib.metadata
import multiprocessing
import os
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from networks import NETWORKS, examples
from variants import MEASURED, Measure

_START, _ANSWER = 180.0, 300.0  # seconds that a worker may take; the first answer of each kind compiles

# Several processes share one accelerator, so none may take all of its memory at the start.
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true",
                "TF_CPP_MIN_LOG_LEVEL": "2"}  # fmt: skip


class Worker:
    """The process of a variant. `error` says why it is absent; `about` holds its versions, device and memory."""

    def __init__(self, name: str, network: str, images: int):
        """Starts the process and waits until it has imported its framework."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, network, images))
        with mock.patch.dict(os.environ, {**_ENVIRONMENT, **os.environ, **MEASURED[name].environment}):
            self._process.start()
        theirs.close()
        self.about = self._answer(_START)

    def ask(self, mode: str, batch_size: int, seconds: float) -> dict[str, Any]:
        """Returns {"images_per_second", "rss_mb"}. Without an answer, returns {} and sets `error`."""
        return self._answer(_ANSWER + seconds, (mode, batch_size, seconds))

    def _answer(self, timeout: float, *requests: tuple[str, int, float]) -> dict[str, Any]:
        try:
            for request in requests:
                self._connection.send(request)
            answered = self._connection.poll(timeout)
            record = self._connection.recv() if answered else {"error": f"no answer in {timeout:.0f} s"}
        except (EOFError, OSError):
            self._process.join(10)
            record = {"error": f"the worker ended with status {self._process.exitcode}"}
        self.error = record.pop("error", "")
        if self.error:
            self.close()
        return record

    def close(self) -> None:
        """Stops the process."""
        self._connection.close()
        self._process.join(5)
        self._process.kill()


def _serve(connection: Connection, name: str, network_name: str, count: int) -> None:
    """Answers requests (mode, batch size, seconds) until the connection is closed."""
    variant, network = MEASURED[name], NETWORKS[network_name]
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    prepared: dict[tuple[str, int], Measure] = {}
    try:
        if variant.own:
            sys.path.insert(0, str(Path(__file__).parents[1]))
            from imgclf_jax.run import environment

            environment.prepare(True)  # before JAX is imported
        module = importlib.import_module(variant.module)
        prepare = module.open_variant(network, **variant.options)
        connection.send({"versions": versions(variant.packages), "device": module.device(), "rss_mb": peak_rss()})
        data = examples(network, count)
        while True:
            mode, batch_size, seconds = connection.recv()
            if (mode, batch_size) not in prepared:
                prepared[mode, batch_size] = prepare(data, mode, batch_size)
            amount, seconds = prepared[mode, batch_size](seconds)
            connection.send({f"{variant.unit}_per_second": amount / seconds, "rss_mb": peak_rss()})
    except EOFError:
        os._exit(0)  # some frameworks' threads take long to end
    except Exception as e:
        first = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
        connection.send({"error": f"{type(e).__name__}: {first}"[:200]})


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The versions of these packages, if installed."""
    names = (dist.metadata["Name"] for dist in importlib.metadata.distributions())
    return {package: importlib.metadata.version(package) for package in sorted({*names} & {*packages})}


def peak_rss() -> float:
    """The peak memory of this process in MB.

    Not from getrusage on Linux, where the count starts with the memory of the parent at the fork.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

"""The orchestrator's side of a worker process: starts, queries and stops it."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from variants import MEASURED

_START, _ANSWER = 180.0, 300.0  # seconds that a worker may take; the first answer of each kind compiles

# Several processes share one accelerator, so none may take all of its memory at the start.
_ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


class Worker:
    """The process of a variant. `error` says why it is absent; `about` holds its versions and device."""

    def __init__(self, name: str, network: str, images: int):
        """Starts the process and waits until it has imported its framework."""
        self.name, self.error = name, ""
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), name, network, str(images)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**_ENVIRONMENT, **os.environ, **MEASURED[name].environment},
        )  # fmt: skip
        self.about = self._answer(_START)

    def ask(self, mode: str, batch_size: int, seconds: float) -> dict[str, Any]:
        """Returns the worker's answer. Without one, returns {} and sets `error`; later requests return {}."""
        if self.error:
            return {}
        assert self._process.stdin is not None
        try:
            print(
                json.dumps({"mode": mode, "batch_size": batch_size, "seconds": seconds}),
                file=self._process.stdin, flush=True,
            )  # fmt: skip
        except BrokenPipeError:
            return self._fail("it ended")
        return self._answer(_ANSWER + seconds)

    def _answer(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                return self._fail(f"no answer in {timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            return self._fail("it ended")
        record = json.loads(line)
        return self._fail(record["error"]) if "error" in record else record

    def _fail(self, why: str) -> dict[str, Any]:
        if why == "it ended":
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-1:]
            why = f"the worker ended with status {self._process.wait(10)} {''.join(last)[:200]}".strip()
        self.close()
        self.error = why
        return {}

    def close(self) -> None:
        """Stops the process."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()

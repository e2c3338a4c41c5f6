"""A command in one process, or in several that share its work."""

import contextlib
from collections.abc import Iterator

from imgclf_jax.core import processes
from imgclf_jax.run import terminal


@contextlib.contextmanager
def joined(coordinator: str, number: int | None, process: int | None, devices: str, heartbeat: int) -> Iterator[None]:
    """Joins the others, see `processes.start`, and begins to log; what ends one process inside ends all."""
    processes.start(coordinator, number, process, devices, heartbeat)
    terminal.setup_logging()
    with processes.ending_together():
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Begins to log, in a process that is on its own."""
    terminal.setup_logging()
    yield

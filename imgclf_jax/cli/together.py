"""Contexts in which a command runs, in one process or several."""

import contextlib
from collections.abc import Iterator

from imgclf_jax.core import processes
from imgclf_jax.core.typing import Value
from imgclf_jax.run import provenance, terminal


@contextlib.contextmanager
def join(
    given: dict[str, Value], coordinator: str, count: int | None, process: int | None, devices: str, heartbeat: int
) -> Iterator[None]:
    """Joins the other processes (see `processes.start`) and sets up logging. If one process fails, all end.

    Raises UserError in all processes unless `given`, the code, the versions and the devices are the same everywhere.
    """
    processes.start(coordinator, count, process, devices, heartbeat)
    terminal.setup_logging()
    with processes.ending_together():
        processes.agree("comparing commands", lambda: given | provenance.process_facts(), processes.QUICK)
        processes.agree("comparing modules", provenance.module_digests, in_both=True)
        processes.agree("comparing devices", lambda: provenance.device_facts(counted=not devices),
                        fix="--local_devices says which devices each process takes", in_both=True)  # fmt: skip
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Sets up logging in a single process."""
    terminal.setup_logging()
    yield

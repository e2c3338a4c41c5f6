"""A command in one process, or in several that share its work."""

import contextlib
from collections.abc import Iterator
from typing import Any

from imgclf_jax.core import processes
from imgclf_jax.run import provenance, terminal


@contextlib.contextmanager
def joined(
    given: dict[str, Any], coordinator: str, number: int | None, process: int | None, devices: str, heartbeat: int
) -> Iterator[None]:
    """Joins the others, see `processes.start`, and begins to log; what ends one process inside ends all.

    Raises UserError in all of them unless what they were `given`, their code, versions and devices are the same.
    """
    processes.start(coordinator, number, process, devices, heartbeat)
    terminal.setup_logging()
    with processes.ending_together():
        processes.agree("comparing commands", lambda: given | provenance.process_facts(), processes.QUICK)
        processes.agree("comparing modules", provenance.module_digests, in_both=True)
        processes.agree("comparing devices", lambda: provenance.device_facts(counted=not devices),
                        fix="--local_devices says which devices each process takes", in_both=True)  # fmt: skip
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Begins to log, in a process that is on its own."""
    terminal.setup_logging()
    yield

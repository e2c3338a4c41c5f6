"""Contexts in which a command runs, in one process or several."""

import contextlib
import os
import re
from collections.abc import Iterator

import jax

from imgclf_jax.core import processes, terminal
from imgclf_jax.core.errors import UsageError, UserError, reason
from imgclf_jax.core.extras import how_to_install
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.run import provenance


@contextlib.contextmanager
def join(
    command: JsonObject, coordinator: str, count: int | None, process: int | None, devices: str, heartbeat: int
) -> Iterator[None]:
    """Joins the other processes (see `processes.start`) and sets up logging.

    Raises UsageError for flags that do not fit together. Raises UserError in all processes unless `command`, the code,
    the versions and the devices are the same everywhere, and if another process dies while this one computes with it.
    """
    if count != 1 and any((coordinator, count, process is not None)):
        if not (coordinator and count and process is not None):
            raise UsageError("give --coordinator, --num_processes and --process_id together, to every process")
        if process >= count:
            raise UsageError(f"--process_id={process}: processes are numbered 0 to {count - 1}")
        if not re.fullmatch(r".+:\d+", coordinator) or int(coordinator.rpartition(":")[2]) > 65535:
            raise UsageError(f"--coordinator={coordinator}: must be HOST:PORT, such as node1:12345")
    if not re.fullmatch(r"(all|\d+(,\d+)*)?", devices):
        raise UsageError(f"--local_devices={devices}: must be 'all', or indices such as 0,1")
    processes.start(coordinator, count, process, devices, heartbeat)
    terminal.setup_logging()
    check_platforms()
    processes.agree(lambda: command)
    processes.agree(provenance.process_facts, in_both=True)
    processes.agree(lambda: provenance.device_facts(counted=not devices), in_both=True,
                    fix="--local_devices says which devices, all of one kind, each process takes")  # fmt: skip
    try:
        yield
    except Exception as e:
        if not processes.has_lost_another(e):
            raise
        raise UserError(f"another process of this run has died or cannot be reached ({reason(e)}); run the same "
                        "command again in all processes") from e  # fmt: skip


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Sets up logging in a single process."""
    terminal.setup_logging()
    check_platforms()
    yield


def check_platforms() -> None:
    """Raises UserError if JAX_PLATFORMS names a platform that JAX does not find here."""
    if named := os.environ.get("JAX_PLATFORMS", ""):
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as e:  # JAX asserts where a plugin is missing
            why = f" ({reason(e)})" if str(e) else ""
            raise UserError(
                f"JAX_PLATFORMS={named!r}: JAX finds no such device here{why}; unset it to use the available devices, "
                f"or install JAX for a GPU: {how_to_install('cuda13')}"
            ) from e

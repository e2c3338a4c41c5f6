"""The context in which a command runs, in one process or several."""

import contextlib
import re
from collections.abc import Iterator

import jax

from imgclf_jax.core import processes, terminal
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.run import provenance

_LOST_PEER = re.compile("Gloo .* failed|remote process exited|task is set to ERROR")  # by Gloo, NCCL and JAX's barriers


@contextlib.contextmanager
def started(
    command: JsonObject, coordinator: str = "", count: int | None = 1, process: int | None = None, devices: str = "",
    heartbeat: int = 100,
) -> Iterator[None]:  # fmt: skip
    """Joins the other processes (see `processes.start`), if there are any, and sets up logging.

    Raises UserError if JAX finds no devices, in all processes unless `command`, the code, the versions and the devices
    are the same everywhere, and if another process dies while this one computes with it.
    """
    processes.start(coordinator, count, process, devices, heartbeat)
    terminal.setup_logging()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:  # JAX asserts where a plugin is missing
        raise UserError(f"JAX finds no devices ({reason(e)}); see JAX_PLATFORMS, and install JAX for them") from e
    # Apart, since a config key and a package may have one name, such as tensorboard.
    for facts in (lambda: command, provenance.process_facts, lambda: provenance.device_facts(counted=not devices)):
        processes.agree(facts)
    try:
        yield
    except Exception as e:
        if processes.count() == 1 or not _LOST_PEER.search(str(e)):
            raise
        raise UserError(f"another process of this run has died or cannot be reached ({reason(e)}); run the same "
                        "command again in all processes") from e  # fmt: skip

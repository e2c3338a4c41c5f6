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
def started(command: JsonObject, counted: bool = True) -> Iterator[None]:
    """Sets up logging and starts JAX's backend.

    Raises UserError if JAX finds no devices, in all processes unless `command`, the code, the versions and the devices
    (also their number, if `counted`) are the same everywhere, and if another process dies while this one computes with
    it.
    """
    terminal.setup_logging()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:  # JAX asserts where a plugin is missing
        raise UserError(f"JAX finds no devices ({reason(e)}); see JAX_PLATFORMS, and install JAX for them") from e
    # Apart, since a config key and a package may have one name, such as tensorboard.
    for facts in (lambda: command, provenance.process_facts, lambda: provenance.device_facts(counted)):
        processes.agree(facts)
    try:
        yield
    except Exception as e:
        if processes.count() == 1 or not _LOST_PEER.search(str(e)):
            raise
        raise UserError(f"another process of this run has died or cannot be reached ({reason(e)}); run the same "
                        "command again in all processes") from e  # fmt: skip

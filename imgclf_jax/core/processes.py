"""The processes of a run: their index and number, and the JSON values that they exchange.

Values travel through the key-value store of JAX's coordination service. The calls of `jax.experimental.multihost_utils`
are device collectives: they need a backend, and on CPU time out after 30 s. If a process dies, JAX ends the others.
"""

import concurrent.futures
import importlib.util
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator

from imgclf_jax.core import internals
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.text import redirect_native_output
from imgclf_jax.core.typing import Json, JsonObject

# Clusters set these for one of several processes. JAX itself reads SLURM_NTASKS, which is also set in a shell inside an
# allocation, where a process would wait for others that nobody starts. On Cloud TPU, JAX asks the machine.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_SIGNS = ("JOB_COMPLETION_INDEX", "TPU_WORKER_ID", "MEGASCALE_COORDINATOR_ADDRESS", "JAX_COORDINATOR_ADDRESS")

ALIKE = "start all processes with the same command, code, versions and environment"
_count, _index = 1, 0
_calls = itertools.count()  # numbers the exchanges, which all processes make in the same order


class ProcessMismatch(UserError):
    """The processes of a run differ."""


def has_started_several() -> bool:
    """Whether the environment says that a cluster started this process as one of several."""
    several = any(os.environ.get(name, "1") != "1" for name in _COUNTS)
    return several or any(name in os.environ for name in _SIGNS) or bool(importlib.util.find_spec("libtpu"))


def started_one_here() -> bool:
    """Whether the cluster started one process on this host. JAX would give it one device and leave the others idle."""
    here = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""))
    return here.partition("(")[0] == "1" and "," not in here


def count() -> int:
    """The number of processes of the run."""
    return _count


def index() -> int:
    """The index of this process. Process 0 alone prints results and writes files other than checkpoints."""
    return _index


def start(
    coordinator: str = "", number: int | None = None, process: int | None = None, devices: str = "",
    heartbeat: int = 100, timeout: int = 300,
) -> None:  # fmt: skip
    """Joins the other processes, before JAX starts a backend. Returns at once if this process runs alone.

    `coordinator` is the HOST:PORT of process 0, `number` the count of processes, `process` the index of this one, and
    `devices` its devices, "all" or their numbers on this host, such as "0,1"; JAX asks the cluster for what is not
    given. JAX aborts all if one is silent for `heartbeat` seconds, or has not joined within `timeout` seconds.
    Raises UserError if the flags do not fit together or the port is in use.
    """
    global _count, _index
    if number == 1 or not (coordinator or number or has_started_several()):
        return
    import jax

    take_all = devices == "all" or (not devices and started_one_here())
    jax.config.update("jax_enable_preemption_service", False)  # until `stopping.stopping`
    try:
        local = [] if take_all else [int(i) for i in devices.split(",")] if devices else None  # []: all; None: JAX's
        if coordinator and process == 0:  # two services of JAX could both listen on it
            socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
        # In a thread, since Python handles signals only between the calls of the main thread.
        concurrent.futures.ThreadPoolExecutor(1).submit(
            jax.distributed.initialize, coordinator or None, number, process, local, initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=86400,
        ).result()  # fmt: skip
    except Exception as e:  # from the network, or from the cluster's interface
        if not (coordinator or number) and "coordinator_address" in str(e):
            return  # JAX recognizes no cluster
        raise UserError(f"the processes cannot join ({reason(e)}); start all within {timeout} s, with --coordinator (a "
                        "free port of the host of process 0), --num_processes and --process_id, or with "
                        "--num_processes=1 to run alone") from e  # fmt: skip
    state = internals.coordination_state()
    _count, _index = state.num_processes, state.process_id
    redirect_native_output()
    agree(lambda: {"--num_processes": _count})


def broadcast[T: Json](function: Callable[[], T]) -> T:
    """Calls `function` in process 0 and returns its result, a JSON value, in all processes.

    All processes call this, in the same order. A UserError or OSError is raised in all, as UserError in the others.
    """
    if _count == 1:
        return function()
    told: JsonObject = {}
    error = None
    if not index():
        try:
            told = {"value": function()}
        except (UserError, OSError) as e:
            error, told = e, {"error": str(e)}
    told = next(_exchange(told))
    if "error" in told:
        raise error or UserError(told["error"])
    return told["value"]


def barrier() -> None:
    """Waits for all processes."""
    if _count > 1:
        list(_exchange(None))


def agree(facts: Callable[[], JsonObject], fix: str = ALIKE) -> None:
    """Raises ProcessMismatch in all processes unless all have equal facts; it names a process and what differs.

    `facts` returns JSON values by name; a single process does not call it. A name that one of two processes lacks is
    not compared, such as a package that one has not imported yet.
    """
    if _count == 1:
        return
    values = _exchange(facts())  # one by one: the processes may have been given different numbers of them
    expected = next(values)
    for process, found in enumerate(values, 1):
        if names := [name for name in expected if name in found and found[name] != expected[name]][:3]:
            a, b = (", ".join(f"{name}={str(of[name])[:100]}" for name in names) for of in (found, expected))
            raise ProcessMismatch(f"process {process} has {a}, process 0 has {b}; {fix}")


def first_in_process_0[T](function: Callable[[], T]) -> T:
    """Calls `function` in process 0, then in the others, so that these find the files that it prepares."""
    if not index():
        result = function()
    barrier()
    return function() if index() else result


def _exchange(value: Json) -> Iterator[Json]:
    """Publishes a value, and returns an iterator that waits for that of each process, by index."""
    call, client = next(_calls), internals.coordination_state().client
    client.key_value_set(f"imgclf_jax/{call}/{index()}", json.dumps(value, default=str))

    def get(process: int) -> Json:
        while True:  # a living process may download a data set for hours, and a dead one ends this one sooner
            try:
                return json.loads(client.blocking_key_value_get(f"imgclf_jax/{call}/{process}", 1000))
            except Exception as e:  # Python handles signals in between
                if "DEADLINE_EXCEEDED" not in str(e):
                    raise

    return map(get, range(_count))

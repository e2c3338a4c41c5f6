"""Coordinates the processes of a run: their index and count, broadcasts from process 0, and ending together.

They exchange JSON values through the key-value store of JAX's coordination service, on process 0. A single process
never waits. The calls of `jax.experimental.multihost_utils` are device collectives: they need a running backend, do not
name a missing process and, on CPU, time out after half a minute.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from imgclf_jax.core import internals, rendezvous, signals
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.text import redirect_native_output
from imgclf_jax.core.typing import Json, JsonObject

log = logging.getLogger(__name__)

# Clusters set these for one of several processes. JAX itself reads SLURM_NTASKS, which is also set in a shell inside an
# allocation, where a process would wait for others that nobody starts. On Cloud TPU, JAX asks the machine.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_SIGNS = ("JOB_COMPLETION_INDEX", "TPU_WORKER_ID", "MEGASCALE_COORDINATOR_ADDRESS", "JAX_COORDINATOR_ADDRESS")

WAIT = 600.0  # seconds that processes wait for each other
QUICK = 20.0  # for calls that take no time
PREPARING = 86400.0  # while a process may download a data set, or read a large checkpoint
ALIKE = "start all processes with the same command, code, versions and environment"
_LOST_PEER = re.compile("Gloo .* failed|remote process exited")  # by Gloo and by NCCL
_count, _index = 1, 0
_hosts: list[str] = []  # the host of each process
_numbers = itertools.count()  # numbers the calls, which all processes make in the same order
_watcher: threading.Thread | None = None
_failure = ""  # the error that ends this process
stops: list[tuple[str, int]] = []  # (signal name, process) of the signals that other processes received
listeners: list[Callable[[str, int], None]] = []  # called with each of these as it arrives
silent: list[int] = []  # the processes that give no sign of life, as far as this one knows


class Apart(UserError):
    """The processes of a run differ, or one of them is missing."""


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
    heartbeat: int = 100, patience: int = 300,
) -> None:  # fmt: skip
    """Joins the other processes, before JAX starts a backend. Returns at once if this process runs alone.

    - `coordinator` is the HOST:PORT of process 0, `number` the count of processes, `process` the index of this one.
    - `devices` are its devices: "all", or their numbers on this host, such as "0,1".
    - If a process does not answer for `heartbeat` seconds, all end.

    JAX asks the cluster for whatever is not given. Raises UserError unless all join within `patience` seconds.
    """
    global _count, _index, _watcher, _hosts
    if number == 1 or not (coordinator or number or has_started_several()):
        return
    take_all = devices == "all" or (not devices and started_one_here())
    local = [] if take_all else [int(i) for i in devices.split(",")] if devices else None  # []: all; None: JAX decides
    # JAX's own SIGTERM handler would replace that of `signals`, and stops only between steps.
    jax.config.update("jax_enable_preemption_service", False)
    _end_with_status_1()
    if coordinator and number and process is not None:
        rendezvous.meet(coordinator, number, process, patience)
        patience = min(patience, 60)  # all have arrived
    try:
        jax.distributed.initialize(
            coordinator or None, number, process, local, initialization_timeout=patience,
            heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=60,
        )  # fmt: skip
    except ValueError as e:
        if not (coordinator or number) and "coordinator_address" in str(e):
            return  # JAX recognizes no cluster
        raise UserError(f"the processes cannot find each other: {reason(e)}; pass --coordinator, --num_processes and "
                        "--process_id to each, or --num_processes=1 to run alone") from e  # fmt: skip
    except Exception as e:  # from the network, or from the cluster's interface
        raise UserError(f"the processes cannot join ({reason(e)}); start all of them within {patience} s, with the "
                        "same --coordinator=HOST:PORT, a free port of the host of process 0") from e  # fmt: skip
    state = internals.coordination_state()
    _count, _index = state.num_processes, state.process_id
    signals.before_exit.append(_tell_of_signal)
    _watcher = threading.Thread(target=_watch, args=(state.client,), name="processes", daemon=True)
    _watcher.start()
    redirect_native_output()
    _hosts = [f"host {name}" for name in gather("join", socket.gethostname(), QUICK)]


def _died() -> str:
    """The sentence of a process that ends since another one is lost."""
    who = ", ".join(map(named, sorted(silent))) or "another process"
    return (f"{who} of this run has died or cannot be reached, so this one ends; run the same command again in all "
            "processes")  # fmt: skip


def _end_with_status_1() -> None:
    """Turns JAX's `abort` after the death of another process into one line and status 1."""

    def end(_: int) -> None:
        os.write(2, f"{named(index())}: {_died()}\n".encode())
        os._exit(1)

    global _handler
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), _handler)


_handler: object = None  # keeps the callback alive, since C has a pointer to it


def named(process: int) -> str:
    """A process and its host, in words."""
    return f"process {process}" + (f" ({_hosts[process]})" if process < len(_hosts) else "")


# Broadcasts, gathers and barriers.


def broadcast_from_process_0[T: Json](what: str, function: Callable[[], T], wait: float = WAIT) -> T:
    """Calls `function` in process 0 and returns its result, a JSON value, in all processes.

    All processes call this, in the same order. Raises Apart if process 0 takes more than `wait` seconds. An error
    in `function` ends process 0, and with it all others.
    """
    if _count == 1:
        return function()
    call = _number()
    return _get(call, what, 0, wait) if index() else _set(call, what, function())


def gather(what: str, value: Json, wait: float = WAIT) -> list[Json]:
    """All-gathers a JSON value: returns the values of all processes, by index."""
    if _count == 1:
        return [value]
    call = _number()
    _set(call, what, value)
    return [_get(call, what, process, wait) for process in range(_count)]


def refuse(what: str, fault: str, fix: str = ALIKE, wait: float = WAIT) -> None:
    """Raises the same Apart in all processes if any of them has a `fault`, a sentence or ""."""
    if faults := [one for one in gather(what, fault, wait) if one]:
        raise Apart(f"{faults[0]}{f' (and {len(faults) - 1} more)' * (len(faults) > 1)}; {fix}")


def agree(
    what: str, facts: Callable[[], JsonObject], wait: float = WAIT, fix: str = ALIKE, in_both: bool = False
) -> None:
    """Raises the same Apart in all processes unless all have equal facts; it names the process and the fact.

    `facts` returns JSON values by name; a single process does not call it. With `in_both`, names that one of two
    processes lacks are ignored.
    """
    if _count == 1:
        return
    own = json.loads(json.dumps(facts(), default=str))
    theirs = broadcast_from_process_0(what, lambda: own, wait)
    names = [name for name in {**theirs, **own} if theirs.get(name) != own.get(name)]
    names = [name for name in names if not in_both or (name in theirs and name in own)]
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    a, b = (", ".join(f"{name}={str(of.get(name))[:100]}" for name in names[:3]) for of in (own, theirs))
    refuse(what, f"{named(index())} has {a}{more}, {named(0)} has {b}" if names else "", fix, wait)


def barrier(what: str, wait: float = WAIT) -> None:
    """Waits for all processes. Raises Apart, naming the first one missing, after `wait` seconds."""
    gather(what, None, wait)


def once_a_host[T: Json](what: str, function: Callable[[], T]) -> T:
    """Calls `function` in process 0, then in one process of each other host, then in the remaining ones.

    So a single process prepares the files on a disk, whether the disk is local to a host or shared.
    """
    own_turn = 0 if index() == 0 else 1 if _hosts.index(_hosts[index()]) == index() else 2
    result: Json = None
    for turn in range(3 if _count > 1 else 1):
        if own_turn == turn:
            result = function()
        barrier(what, PREPARING)
    return result


def _number() -> int:
    """The number of this call, the same in all processes since they make the same calls."""
    return next(_numbers)


def _client() -> Any:
    return internals.coordination_state().client


def _set(call: int, what: str, value: Json) -> Json:
    message = json.dumps([what, value])
    _client().key_value_set(f"imgclf_jax/call/{call}/{index()}", message)
    return json.loads(message)[1]


def _get(call: int, what: str, process: int, wait: float) -> Json:
    try:
        message = _client().blocking_key_value_get(f"imgclf_jax/call/{call}/{process}", int(wait * 1000))
    except Exception as e:
        if "DEADLINE_EXCEEDED" not in str(e):
            raise
        raise Apart(f"{named(process)} has not reached the same point ({what}) within {wait:g} s; see its log, end all "
                    "processes, and run the same command again") from e  # fmt: skip
    theirs, value = json.loads(message)
    if theirs != what:
        raise Apart(f"{named(process)} is at another point ({theirs}) than {named(index())} ({what}), so they were "
                    f"started differently; {ALIKE}")  # fmt: skip
    return value


def publish(name: str, value: Json, again: bool = False) -> None:
    """Publishes a JSON value to all processes. A name can be used once, unless `again`."""
    _client().key_value_set(f"imgclf_jax/put/{name}", json.dumps(value), allow_overwrite=again)


def published(folder: str) -> JsonObject:
    """The values published so far under `folder/NAME`, by NAME."""
    found = _client().key_value_dir_get(f"imgclf_jax/put/{folder}")
    return {key.rpartition("/")[2]: json.loads(value) for key, value in found}


# Ending together.


def tell(kind: str, text: str, status: int = 0) -> None:
    """Tells the other processes that this one received a signal (`kind` "stop") or is ending ("end")."""
    event = json.dumps({"kind": kind, "process": index(), "text": text, "status": status})
    for number in itertools.count():
        try:
            _client().key_value_set(f"imgclf_jax/event/{number}", event)
            return
        except Exception as e:
            if "ALREADY_EXISTS" not in str(e):
                raise


def _watch(client: Any) -> None:
    """Receives, in a thread, the events that other processes `tell`."""
    number = 0
    while True:
        try:
            event = json.loads(client.blocking_key_value_get(f"imgclf_jax/event/{number}", int(PREPARING * 1000)))
        except Exception as e:
            if "DEADLINE_EXCEEDED" in str(e):  # no event for a day
                continue
            return  # the service has ended
        number += 1
        if event["process"] == index():
            continue
        if event["kind"] == "end":
            signals.before_exit.remove(_tell_of_signal)
            if not index():
                time.sleep(1.0)  # the service ends with this process: let the others receive the event first
            line = f"{named(index())} ends because {named(event['process'])} does: {event['text']}"
            signals.leave(event["status"], line)
        stops.append((event["text"], event["process"]))
        for listener in listeners:
            listener(event["text"], event["process"])


def _tell_of_signal(status: int, line: str) -> None:
    """Tells the others that a signal ends this process. Gives up after two seconds if the service does not answer."""
    thread = threading.Thread(target=tell, args=("end", line, status), daemon=True)
    thread.start()
    thread.join(2.0)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Inside, an error that ends this process also ends the others, with status 1; they would wait for it."""
    global _failure
    try:
        yield
    except BaseException as raised:
        e = _explain(raised)
        if _count > 1:
            _failure = f"error: {e}" if isinstance(e, UserError | OSError) else f"{type(e).__name__}: {reason(e)}"
            if index():  # if all raise the error, let process 0 report it and end the others
                time.sleep(1.0)
            with contextlib.suppress(Exception):
                tell("end", _failure, 1)
        if e is raised:
            raise
        raise e from raised


def _explain(error: BaseException) -> BaseException:
    """A UserError in place of the error of a collective whose other process has died; else `error`."""
    if _count == 1 or not isinstance(error, jax.errors.JaxRuntimeError) or not _LOST_PEER.search(str(error)):
        return error
    return UserError(f"{named(index())}: {_died()} ({reason(error)})")


def end(status: int) -> NoReturn:
    """Exits with `status`: together with the others, or at once after an error."""
    if _count > 1:
        if not _failure:
            barrier("end")
            for number in signals.SIGNALS:  # a launcher may signal the others when the first process ends
                signal.signal(number, signal.SIG_IGN)
            jax.distributed.shutdown()
            if _watcher:
                _watcher.join(10.0)
        else:
            time.sleep(0.0 if index() else 1.0)  # the service ends with process 0: let all hear of it first
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 1)
    sys.exit(status)

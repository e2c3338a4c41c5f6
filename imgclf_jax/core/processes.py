"""Several processes that share one run: which of them this is, what one decides for all, and how all of them end.

They talk through JAX's coordination service, which process 0 serves. In a run of one process, which is the usual case,
nothing here waits for anybody.
"""

import contextlib
import ctypes
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from imgclf_jax.core import clusters, internals, rendezvous, signals
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.text import keep_output

log = logging.getLogger(__name__)

WAIT = 600.0  # seconds that processes wait for each other
QUICK = 20.0  # the same where nothing takes long
PREPARING = 86400.0  # the same where a process may download a data set
ALIKE = "start all processes with the same command, code, versions and environment"
_count, _index = 1, 0
_hosts: list[str] = []  # of each process
_numbers = itertools.count()  # the calls that all processes make in the same order
_watcher: threading.Thread | None = None
_failure = ""  # what this process ends by
stops: list[tuple[str, int]] = []  # the signals that other processes got: the name and the process
listeners: list[Callable[[str, int], None]] = []  # called with those that come


def count() -> int:
    """How many processes share the run."""
    return _count


def index() -> int:
    """Which of them this is; process 0 alone writes files (checkpoints are written by all) and prints results."""
    return _index


def start(
    coordinator: str = "", number: int | None = None, process: int | None = None, devices: str = "",
    heartbeat: int = 100, patience: int = 300,
) -> None:  # fmt: skip
    """Joins the other processes, before JAX computes anything; does nothing in a process that is on its own.

    The flags of `launch.py` give the address HOST:PORT of process 0, how many processes there are, which one this is,
    and its devices: "all", or their numbers on this host, such as "0,1". What is not given is asked of the cluster that
    started the process. A process that does not answer for `heartbeat` seconds is taken for dead, and all end. All must
    join within `patience` seconds. Raises UserError if they cannot.
    """
    global _count, _index, _watcher, _hosts
    if number == 1 or not (coordinator or number or clusters.has_started_several()):
        return
    whole = devices == "all" or (not devices and clusters.started_one_here())
    known = [] if whole else [int(i) for i in devices.split(",")] if devices else None  # [] for all; None: JAX decides
    # JAX's own handler of SIGTERM would replace that of `signals`, and it knows of steps alone.
    jax.config.update("jax_enable_preemption_service", False)
    _end_with_status_1()
    if coordinator and number and process is not None:
        rendezvous.meet(coordinator, number, process, patience)
        patience = min(patience, 60)  # all are here
    try:
        jax.distributed.initialize(
            coordinator or None, number, process, known, initialization_timeout=patience,
            heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=60,
        )  # fmt: skip
    except ValueError as e:
        if not (coordinator or number) and "coordinator_address" in str(e):
            return  # no cluster that JAX knows
        raise UserError(f"the processes cannot find each other: {reason(e)}; pass --coordinator, --num_processes and "
                        "--process_id to each, or --num_processes=1 to run alone") from e  # fmt: skip
    except Exception as e:  # of the network, or of the cluster's own interface
        raise UserError(f"the processes cannot join ({reason(e)}); start all of them within {patience} s, with the "
                        "same --coordinator=HOST:PORT, a free port of the host of process 0") from e  # fmt: skip
    state = internals.coordination_state()
    _count, _index = state.num_processes, state.process_id
    signals.before_exit.append(_tell_of_signal)
    _watcher = threading.Thread(target=_watch, args=(state.client,), name="processes", daemon=True)
    _watcher.start()
    keep_output()
    _hosts = [f"host {name}" for name in gather("join", socket.gethostname(), QUICK)]


def _end_with_status_1() -> None:
    """Where JAX finds that another process is dead, it ends this one by `abort`; then the status is 1."""

    def end(_: int) -> None:
        os.write(2, f"{_name(index())}: another process of this run has died or cannot be reached, so this one ends; "
                    "run the same command again in all\n".encode())  # fmt: skip
        os._exit(1)

    global _handler
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), _handler)


_handler: Any = None  # kept, since C has a pointer to it


def _name(process: int) -> str:
    return f"process {process}" + (f" ({_hosts[process]})" if process < len(_hosts) else "")


# What one process decides, and where all wait.


def broadcast_from_process_0(what: str, function: Callable[[], Any], wait: float = WAIT) -> Any:
    """What `function` gives in process 0, a JSON value; the others do not call it.

    All processes call this, in the same order. Raises UserError if process 0 is not done after `wait` seconds. What the
    function raises ends process 0, and by that all of them.
    """
    if _count == 1:
        return function()
    call = _number()
    return _get(call, what, 0, wait) if index() else _set(call, what, function())


def gather(what: str, value: Any, wait: float = WAIT) -> list[Any]:
    """The values, JSON ones, of all processes, by their numbers."""
    if _count == 1:
        return [value]
    call = _number()
    _set(call, what, value)
    return [_get(call, what, process, wait) for process in range(_count)]


def refuse(what: str, fault: str, fix: str = ALIKE, wait: float = WAIT) -> None:
    """Raises UserError in all processes alike if any of them has a `fault`, a sentence; "" is none."""
    if faults := [one for one in gather(what, fault, wait) if one]:
        raise UserError(f"{faults[0]}{f' (as {len(faults) - 1} more)' * (len(faults) > 1)}; {fix}")


def agree(
    what: str, facts: Callable[[], dict[str, Any]], wait: float = WAIT, fix: str = ALIKE, in_both: bool = False
) -> None:
    """Raises UserError in all processes alike, naming process and fact, unless all have the same JSON values as facts.

    With `in_both`, what is a fact in one process alone does not count. Without others the facts are not asked for.
    """
    if _count == 1:
        return
    own = json.loads(json.dumps(facts(), default=str))
    theirs = broadcast_from_process_0(what, lambda: own, wait)
    names = [name for name in {**theirs, **own} if theirs.get(name) != own.get(name)]
    names = [name for name in names if not in_both or (name in theirs and name in own)]
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    a, b = (", ".join(f"{name}={str(of.get(name))[:100]}" for name in names[:3]) for of in (own, theirs))
    refuse(what, f"{_name(index())} has {a}{more}, {_name(0)} has {b}" if names else "", fix, wait)


def barrier(what: str, wait: float = WAIT) -> None:
    """Returns when all processes are here. Raises UserError, naming the first that is missing, after `wait` seconds."""
    gather(what, None, wait)


def once_a_host(what: str, function: Callable[[], Any]) -> Any:
    """`function` in all processes: first in process 0, then in one process of each other host, then in the others.

    So what it prepares on a disk is prepared by one process, be it the disk of one host or of all.
    """
    place = 0 if index() == 0 else 1 if _hosts.index(_hosts[index()]) == index() else 2
    result = None
    for turn in range(3 if _count > 1 else 1):
        if place == turn:
            result = function()
        barrier(what, PREPARING)
    return result


def _number() -> int:
    """Of this call: the same in all processes, since they make the same calls."""
    return next(_numbers)


def _client() -> Any:
    return internals.coordination_state().client


def _set(call: int, what: str, value: Any) -> Any:
    said = json.dumps([what, value])
    _client().key_value_set(f"imgclf_jax/call/{call}/{index()}", said)
    return json.loads(said)[1]


def _get(call: int, what: str, process: int, wait: float) -> Any:
    try:
        said = _client().blocking_key_value_get(f"imgclf_jax/call/{call}/{process}", int(wait * 1000))
    except Exception as e:
        if "DEADLINE_EXCEEDED" not in str(e):
            raise
        raise UserError(f"{_name(process)} has not come to the same place ({what}) in {wait:g} s; look into its log, "
                        "end all processes, and run the same command again") from e  # fmt: skip
    there, value = json.loads(said)
    if there != what:
        raise UserError(f"{_name(process)} does something else ({there}) than {_name(index())} ({what}), so they were "
                        f"not given the same; {ALIKE}")  # fmt: skip
    return value


def put(name: str, value: Any) -> None:
    """Says a JSON value to all, once under each name."""
    _client().key_value_set(f"imgclf_jax/put/{name}", json.dumps(value))


def all_put(folder: str) -> dict[str, Any]:
    """What has been `put` under names that begin with `folder` and a slash, by the rest of the name."""
    found = _client().key_value_dir_get(f"imgclf_jax/put/{folder}")
    return {key.rpartition("/")[2]: json.loads(value) for key, value in found}


# How all of them end.


def tell(kind: str, text: str, status: int = 0) -> None:
    """Tells all other processes that this one got a signal ("stop") or ends now ("end")."""
    event = json.dumps({"kind": kind, "process": index(), "text": text, "status": status})
    for number in itertools.count():
        try:
            _client().key_value_set(f"imgclf_jax/event/{number}", event)
            return
        except Exception as e:
            if "ALREADY_EXISTS" not in str(e):
                raise


def _watch(client: Any) -> None:
    """In a thread: what the other processes tell."""
    for number in itertools.count():
        try:
            event = json.loads(client.blocking_key_value_get(f"imgclf_jax/event/{number}", int(PREPARING * 1000)))
        except Exception:  # the service has ended
            return
        if event["process"] == index():
            continue
        if event["kind"] == "end":
            signals.before_exit.remove(_tell_of_signal)
            if not index():
                time.sleep(1.0)  # the service ends with this process, and the others have something to say
            line = f"{_name(index())} ends, since {_name(event['process'])} does: {event['text']}"
            signals.leave(event["status"], line)
        stops.append((event["text"], event["process"]))
        for listener in listeners:
            listener(event["text"], event["process"])


def _tell_of_signal(status: int, line: str) -> None:
    """A signal ends this process at once. It must, even if the service does not answer."""
    thread = threading.Thread(target=tell, args=("end", line, status), daemon=True)
    thread.start()
    thread.join(2.0)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """What ends this process by an error ends the others too, with status 1: they would wait for it."""
    global _failure
    try:
        yield
    except BaseException as e:
        if _count > 1:
            _failure = f"error: {e}" if isinstance(e, UserError | OSError) else f"{type(e).__name__}: {reason(e)}"
            if index():  # of an error that all meet, process 0 alone tells the person, and ends the others
                time.sleep(1.0)
            with contextlib.suppress(Exception):
                tell("end", _failure, 1)
        raise


def end(status: int) -> NoReturn:
    """Ends this process with `status`: in order with the others, or, after an error, at once."""
    if _count > 1:
        if not _failure:
            barrier("end")
            for number in signals.SIGNALS:  # whoever started the processes may send one to all when the first ends
                signal.signal(number, signal.SIG_IGN)
            jax.distributed.shutdown()
            if _watcher:
                _watcher.join(10.0)
        else:
            time.sleep(0.0 if index() else 1.0)  # until all have heard of it: the service ends with process 0
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 1)
    sys.exit(status)

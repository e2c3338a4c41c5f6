"""Brings the processes of a run together before JAX's coordination service, which crashes on a wrong count or port.

Process 0 listens at the coordinator's address. Every other process connects, introduces itself in one line of JSON, and
receives "wait". Once all have connected, or on a fault, it receives the fault, or "".
"""

import contextlib
import json
import logging
import os
import selectors
import socket
import time

from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Json, JsonObject

log = logging.getLogger(__name__)

_PATIENT = 20.0  # seconds until the log names missing processes, and until another program at the address is an error
_BUSY = 5.0  # seconds until the port of a process 0 that has just ended is free again
_LONGEST = 600.0  # seconds that a process waits for the outcome; process 0 gives up earlier
_READ = 2.0  # seconds that a caller has to send its line: health checks and port scanners send nothing


def meet(address: str, number: int, process: int, patience: float) -> None:
    """Waits until all `number` processes have connected to `address`, the HOST:PORT of process 0.

    Raises the same UserError in every process that can be reached if the port is taken, two processes have the same
    index, their counts differ, or one ends or does not connect within `patience` seconds.
    """
    host, _, port = address.rpartition(":")
    where = host.strip("[]"), int(port)
    (_report if process else _receive)(where, number, process, patience)


def _receive(where: tuple[str, int], number: int, process: int, patience: float) -> None:
    """In process 0: waits for the others and tells them the outcome."""
    port, end = where[1], time.monotonic() + patience
    callers: dict[int, tuple[socket.SocketIO, str]] = {}  # the stream and the host of each
    fault, late = "", time.monotonic() + _PATIENT
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(where, number))
        waiting = stack.enter_context(selectors.DefaultSelector())
        waiting.register(server, selectors.EVENT_READ)
        while len(callers) < number - 1 and not fault:
            for key, _ in waiting.select(1.0):
                if key.data is not None:
                    fault = f"process {key.data} (host {callers[key.data][1]}) ended before all had joined; see its log"
                elif caller := _greet(server, stack):
                    stream, hello = caller
                    fault = fault or _find_fault(hello, number, callers)
                    callers.setdefault(hello["process"], (stream, hello["host"]))
                    waiting.register(stream, selectors.EVENT_READ, hello["process"])
                    if fault:
                        _send(stream, fault)
            missing = ", ".join(str(one) for one in range(1, number) if one not in callers)
            if time.monotonic() > end:
                fault = fault or (
                    f"process {missing} has not connected to port {port} of host {socket.gethostname()} within "
                    f"{patience:g} s; start all processes with the same --coordinator"
                )
            elif missing and time.monotonic() > late:
                late = end
                log.warning("waiting for process %s at port %d of host %s", missing, port, socket.gethostname())
        server.close()
        for stream, _ in callers.values():
            _send(stream, fault)
    if fault:
        raise UserError(fault)


def _listen(where: tuple[str, int], number: int) -> socket.socket:
    """Opens a socket on all addresses of this host. Raises UserError if another program listens on the port."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    end = time.monotonic() + _BUSY
    while True:
        with contextlib.ExitStack() as stack:
            if stream := _call(where, number, 0, stack, _READ)[1]:  # to another process 0, which now knows of this one
                _await_outcome(stream, "the same address")
        try:
            return socket.create_server(("", where[1]), family=family, backlog=number + 16, dualstack_ipv6=both)
        except OverflowError as e:
            raise UserError(f"--coordinator: {where[1]} is not a port; allowed: 1 to 65535") from e
        except OSError as e:
            if time.monotonic() > end:
                why = os.strerror(e.errno) if e.errno else e
                raise UserError(f"port {where[1]} of host {socket.gethostname()} cannot be used ({why}); pass a "
                                "free port of that host in --coordinator to all processes") from e  # fmt: skip
        time.sleep(0.2)


def _greet(server: socket.socket, stack: contextlib.ExitStack) -> tuple[socket.SocketIO, JsonObject] | None:
    """Accepts a connection: returns its stream and the caller's introduction; None unless it is a process of a run."""
    connection, _ = server.accept()
    connection.settimeout(_READ)
    stream = connection.makefile("rwb", buffering=0)
    connection.close()  # when the stream is closed too
    try:
        said = json.loads(stream.readline(4096))
        hello = {"process": int(said["process"]), "number": int(said["number"]), "host": str(said["host"])}
        stream.write(b'"wait"\n')
    except (OSError, ValueError, TypeError, KeyError):
        stream.close()
        return None
    return stack.enter_context(contextlib.closing(stream)), hello


def _find_fault(hello: JsonObject, number: int, callers: dict[int, tuple[socket.SocketIO, str]]) -> str:
    process, host = hello["process"], hello["host"]
    if hello["number"] != number:
        return (f"process {process} (host {host}) was given --num_processes={hello['number']}, process 0 (host "
                f"{socket.gethostname()}) --num_processes={number}; give all processes the same")  # fmt: skip
    if process in callers or process == 0:
        other = callers[process][1] if process else socket.gethostname()
        return (f"two processes were given --process_id={process}: on host {other} and on host {host}; "
                f"number them from 0 to {number - 1}")  # fmt: skip
    return ""


def _send(stream: socket.SocketIO, fault: str) -> None:
    with contextlib.suppress(OSError):
        stream.write(json.dumps(fault).encode() + b"\n")


def _report(where: tuple[str, int], number: int, process: int, patience: float) -> None:
    """In the other processes: connects to process 0 and waits for the outcome."""
    name, began = f"{where[0]}:{where[1]}", time.monotonic()
    strange: float | None = None  # the time since which something other than a waiting process 0 answers
    warned = False
    while time.monotonic() < began + patience:
        with contextlib.ExitStack() as stack:
            called = time.monotonic()
            answered, stream = _call(where, number, process, stack, _PATIENT)
            if stream:
                _await_outcome(stream, name)
                _await_service(where)
                return
        strange = (strange or called) if answered else None
        if strange and time.monotonic() > strange + _PATIENT:
            raise UserError(f"{name} answers, but not as process 0 of a run that is starting: another program has the "
                            "port, or the run began without this process; start all processes together, with a free "
                            "port in --coordinator")  # fmt: skip
        if not warned and time.monotonic() > began + _PATIENT:
            warned = True
            log.warning("process %d is waiting for process 0 at %s", process, name)
        time.sleep(0.2)
    raise UserError(f"process 0 does not listen at {name} after {patience:g} s; start it on that host, and all "
                    "processes with the same --coordinator")  # fmt: skip


def _call(
    where: tuple[str, int], number: int, process: int, stack: contextlib.ExitStack, wait: float
) -> tuple[bool, Json]:
    """Returns whether anything listens there, and the stream to process 0 if it answers within `wait` seconds."""
    hello = {"process": process, "number": number, "host": socket.gethostname()}
    answered = False
    with contextlib.suppress(OSError, ValueError):
        connection = stack.enter_context(socket.create_connection(where, timeout=_READ))
        answered = True
        connection.settimeout(wait)
        stream = stack.enter_context(contextlib.closing(connection.makefile("rwb", buffering=0)))
        stream.write(json.dumps(hello).encode() + b"\n")
        if json.loads(stream.readline(4096)) == "wait":
            connection.settimeout(_LONGEST)
            return True, stream
    return answered, None


def _await_service(where: tuple[str, int]) -> None:
    """Waits briefly until JAX's service listens in place of `meet`; a refused client retries only after a second."""
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(where, timeout=_READ):
            return
        time.sleep(0.01)


def _await_outcome(stream: socket.SocketIO, name: str) -> None:
    """Waits until process 0 sends the outcome, or ends. Raises UserError for a fault."""
    try:
        fault = json.loads(stream.readline())
    except (OSError, ValueError):
        fault = f"process 0 at {name} ended before all had joined; see its log"
    if fault:
        raise UserError(fault)

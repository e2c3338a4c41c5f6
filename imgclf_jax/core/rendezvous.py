"""Lets the processes of a run meet before JAX's coordination service starts, which crashes on a wrong number or port.

Process 0 listens at the coordinator's address. Every other process connects, introduces itself in one line of JSON, and
gets the answer "wait". Once all have come, or something is wrong, it is told the fault, or "".
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

_PATIENT = 20.0  # seconds after which the log says who is missing, and a stranger at the address is given up
_BUSY = 5.0  # seconds in which a process 0 that has just ended gives its port back
_LONGEST = 600.0  # seconds that a process waits for what process 0 says, which is patient for less
_READ = 2.0  # seconds that a caller has for its line: health checks and port scanners say nothing


def meet(address: str, number: int, process: int, patience: float) -> None:
    """Waits until all `number` processes have come to `address`, the HOST:PORT of process 0.

    Raises UserError, with the same sentence in every process that can be reached, if the port is taken, two processes
    have the same number, their counts differ, or one ends or does not come within `patience` seconds.
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
                    fault = f"process {key.data} (host {callers[key.data][1]}) has ended before all came; see its log"
                elif caller := _greet(server, stack):
                    stream, told = caller
                    fault = fault or _find_fault(told, number, callers)
                    callers.setdefault(told["process"], (stream, told["host"]))
                    waiting.register(stream, selectors.EVENT_READ, told["process"])
                    if fault:
                        _say(stream, fault)
            missing = ", ".join(str(one) for one in range(1, number) if one not in callers)
            if time.monotonic() > end:
                fault = fault or (f"process {missing} has not come to port {port} of host {socket.gethostname()} in "
                                  f"{patience:g} s; start all processes with the same --coordinator")  # fmt: skip
            elif missing and time.monotonic() > late:
                late = end
                log.warning("waiting for process %s at port %d of host %s", missing, port, socket.gethostname())
        server.close()
        for stream, _ in callers.values():
            _say(stream, fault)
    if fault:
        raise UserError(fault)


def _listen(where: tuple[str, int], number: int) -> socket.socket:
    """Opens a socket on all addresses of this host. Raises UserError if another program listens on the port."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    end = time.monotonic() + _BUSY
    while True:
        with contextlib.ExitStack() as stack:
            if stream := _call(where, number, 0, stack, _READ)[1]:  # of another process 0, which now knows of this one
                _heed(stream, "the same address")
        try:
            return socket.create_server(("", where[1]), family=family, backlog=number + 16, dualstack_ipv6=both)
        except OverflowError as e:
            raise UserError(f"--coordinator: {where[1]} is no port; allowed: 1 to 65535") from e
        except OSError as e:
            if time.monotonic() > end:
                why = os.strerror(e.errno) if e.errno else e
                raise UserError(f"port {where[1]} of host {socket.gethostname()} cannot be used ({why}); pass a "
                                "free port of that host in --coordinator to all processes") from e  # fmt: skip
        time.sleep(0.2)


def _greet(server: socket.socket, stack: contextlib.ExitStack) -> tuple[socket.SocketIO, JsonObject] | None:
    """Accepts a connection: its stream and what the caller says; None if it is no process of a run."""
    connection, _ = server.accept()
    connection.settimeout(_READ)
    stream = connection.makefile("rwb", buffering=0)
    connection.close()  # when the stream is closed too
    try:
        told = json.loads(stream.readline(4096))
        told = {"process": int(told["process"]), "number": int(told["number"]), "host": str(told["host"])}
        stream.write(b'"wait"\n')
    except (OSError, ValueError, TypeError, KeyError):
        stream.close()
        return None
    return stack.enter_context(contextlib.closing(stream)), told


def _find_fault(told: JsonObject, number: int, callers: dict[int, tuple[socket.SocketIO, str]]) -> str:
    process, host = told["process"], told["host"]
    if told["number"] != number:
        return (f"process {process} (host {host}) was given --num_processes={told['number']}, process 0 (host "
                f"{socket.gethostname()}) --num_processes={number}; give all processes the same")  # fmt: skip
    if process in callers or process == 0:
        other = callers[process][1] if process else socket.gethostname()
        return (f"two processes were given --process_id={process}: on host {other} and on host {host}; "
                f"number them from 0 to {number - 1}")  # fmt: skip
    return ""


def _say(stream: socket.SocketIO, fault: str) -> None:
    with contextlib.suppress(OSError):
        stream.write(json.dumps(fault).encode() + b"\n")


def _report(where: tuple[str, int], number: int, process: int, patience: float) -> None:
    """In the other processes: reports to process 0 and waits for the outcome."""
    name, began = f"{where[0]}:{where[1]}", time.monotonic()
    strange: float | None = None  # since when something answers there that is no process 0 which waits
    warned = False
    while time.monotonic() < began + patience:
        with contextlib.ExitStack() as stack:
            called = time.monotonic()
            answered, stream = _call(where, number, process, stack, _PATIENT)
            if stream:
                _heed(stream, name)
                _await_service(where)
                return
        strange = (strange or called) if answered else strange
        if strange and time.monotonic() > strange + _PATIENT:
            raise UserError(f"what answers at {name} is not process 0 of a run that starts: another program has the "
                            "port, or the run began without this process; start all processes together, with a free "
                            "port in --coordinator")  # fmt: skip
        if not warned and time.monotonic() > began + _PATIENT:
            warned = True
            log.warning("process %d is waiting for process 0 at %s", process, name)
        time.sleep(0.2)
    raise UserError(f"process 0 has not come to {name} in {patience:g} s; start it on that host, and all processes "
                    "with the same --coordinator")  # fmt: skip


def _call(
    where: tuple[str, int], number: int, process: int, stack: contextlib.ExitStack, wait: float
) -> tuple[bool, Json]:
    """Whether anything listens there, and the stream to process 0 if it answers within `wait` seconds, else None."""
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
    """Waits briefly until JAX's service listens in place of `meet`: a refused client would wait a whole second."""
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(where, timeout=_READ):
            return
        time.sleep(0.01)


def _heed(stream: socket.SocketIO, name: str) -> None:
    """Waits for the outcome from process 0, or for its end."""
    try:
        fault = json.loads(stream.readline())
    except (OSError, ValueError):
        fault = f"process 0 at {name} has ended before all came; see its log"
    if fault:
        raise UserError(fault)

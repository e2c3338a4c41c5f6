"""The rendezvous of processes, played by threads over real sockets."""

import socket
import threading
import time

import pytest
from processes_check import find_port

from imgclf_jax.core import rendezvous
from imgclf_jax.core.errors import UserError


@pytest.fixture
def port(monkeypatch):
    """A free port, with timeouts of tenths of a second instead of seconds."""
    monkeypatch.setattr(rendezvous, "_PATIENT", 1.0)
    monkeypatch.setattr(rendezvous, "_BUSY", 0.3)
    monkeypatch.setattr(rendezvous, "_READ", 0.3)
    monkeypatch.setattr(rendezvous, "_await_service", lambda where: None)  # JAX's, which is not started here
    return find_port()


def meet(port, *processes, hosts=("localhost",), patience=10.0):
    """Returns the outcome for each process, "" for success; a process is its index and the count that it was given."""
    told = {}

    def play(place, process, number):
        try:
            rendezvous.meet(f"{hosts[place % len(hosts)]}:{port}", number, process, patience)
            told[place] = ""
        except UserError as e:
            told[place] = str(e)

    threads = [threading.Thread(target=play, args=(place, *one)) for place, one in enumerate(processes)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(20)
    return [told[place] for place in range(len(processes))]


def test_all_come_by_any_name_of_the_host(port):
    names = ["localhost", "127.0.0.1", *(["[::1]"] if socket.has_dualstack_ipv6() else []), socket.gethostname()]
    assert meet(port, *((i, len(names)) for i in range(len(names))), hosts=names) == [""] * len(names)


def test_the_order_does_not_matter(port):
    assert meet(port, (2, 3), (1, 3), (0, 3)) == [""] * 3


@pytest.mark.parametrize(("processes", "sentence"), [
    ([(0, 2), (1, 3)], "process 1 (host HOST) was given --num_processes=3, process 0 (host HOST) --num_processes=2"),
    ([(0, 3), (1, 3), (1, 3)], "two processes were given --process_id=1: on host HOST and on host HOST; number"),
    ([(0, 2), (0, 2)], "two processes were given --process_id=0: on host HOST and on host HOST; number them"),
])  # fmt: skip
def test_a_wrong_number_is_told_to_all(port, processes, sentence):
    told = meet(port, *processes)
    assert len(set(told)) == 1
    assert told[0].startswith(sentence.replace("HOST", socket.gethostname()))


def test_who_does_not_come_is_named_to_all(port):
    told = meet(port, (0, 4), (2, 4), patience=1.0)
    assert len(set(told)) == 1
    assert told[0].startswith(
        f"process 1, 3 has not connected to port {port} of host {socket.gethostname()} within 1 s"
    )
    assert meet(port, (1, 2), patience=0.5)[0].startswith(f"process 0 does not listen at localhost:{port} after 0.5 s")


def test_who_ends_while_others_wait_is_named(port):
    def end_soon():
        time.sleep(0.3)
        with socket.create_connection(("localhost", port)) as connection:
            connection.sendall(b'{"process": 1, "number": 3, "host": "there"}\n')
            connection.recv(100)

    thread = threading.Thread(target=end_soon)
    thread.start()
    assert meet(port, (0, 3))[0].startswith("process 1 (host there) ended before all had joined")
    thread.join()


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_port_of_another_program(port, says):
    """The coordinator reports it; the other processes cannot know it, but end too."""
    silent = []
    with socket.create_server(("", port)) as other:

        def answer():
            while True:
                try:
                    connection = other.accept()[0]
                except OSError:
                    return
                connection.sendall(says)
                if says:
                    connection.close()
                else:
                    silent.append(connection)

        threading.Thread(target=answer, daemon=True).start()
        told = meet(port, (0, 2), (1, 2))
        other.shutdown(socket.SHUT_RDWR)
    for connection in silent:
        connection.close()
    assert f"port {port} of host {socket.gethostname()} cannot be used (Address already in use); pass a free" in told[0]
    assert f"localhost:{port} answers, but not as process 0 of a run that is starting" in told[1]


def test_who_reached_the_run_before_waits_for_the_next(port, monkeypatch):
    """In a restart, the old process 0 may still have answered. One answer used to end the wait 20 s later."""
    result = []
    with socket.create_server(("", port)) as old:
        waiting = threading.Thread(target=lambda: result.extend(meet(port, (1, 2))))
        waiting.start()
        old.accept()[0].close()
    time.sleep(1.5)
    assert meet(port, (0, 2)) == [""]
    waiting.join()
    assert result == [""]


def test_a_health_check_is_no_process(port):
    """It connects and sends nothing, or something else."""

    def probe():
        for says in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"process": "x"}\n'):
            with socket.create_connection(("localhost", port), timeout=5) as connection:
                connection.sendall(says)

    result = []
    first = threading.Thread(target=lambda: result.extend(meet(port, (0, 2))))
    first.start()
    time.sleep(0.3)
    probe()
    assert meet(port, (1, 2)) == [""]
    first.join()
    assert result == [""]

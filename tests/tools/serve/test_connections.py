"""What a client may do to a connection, over real ones."""

import asyncio
import contextlib
import dataclasses
import socket
import sys
import threading
import time
from unittest import mock

import pytest
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from uvicorn.server import ServerState

from imgclf_jax.tools.serve import connections
from imgclf_jax.tools.serve.connections import ConnectionLimits, server_settings

LIMITS = ConnectionLimits(
    headers_seconds=0.3, request_seconds=0.5, connections=6, of_a_client=4, grace_seconds=0.3, linger_seconds=0.1
)
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


async def size(request):
    return PlainTextResponse(str(len(await request.body())))


async def nothing(request):
    """Answers without the body."""
    return PlainTextResponse("nothing")


async def much(request):
    """More than a socket holds while nobody reads."""
    return PlainTextResponse("x" * 30_000_000)


STATE = []


async def endless(request):
    await request.body()
    STATE.append("begun")
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError as e:
        STATE.append(str(e))
        raise


@contextlib.contextmanager
def in_thread(settings):
    """The port of a server in a thread of this process."""
    sockets = [settings.bind_socket()]
    running = uvicorn.Server(settings)
    thread = threading.Thread(target=running.run, kwargs={"sockets": sockets})
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield sockets[0].getsockname()[1]
    finally:
        running.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def server(limits=LIMITS):
    app = Starlette(routes=[Route("/", size, methods=["GET", "POST"]), Route("/much", much),
                            Route("/endless", endless),
                            Route("/nothing", nothing, methods=["POST"])])  # fmt: skip
    return in_thread(server_settings(app, "127.0.0.1", 0, limits))


@pytest.fixture(scope="module")
def port():
    with server() as port:
        yield port


@pytest.fixture(scope="module")
def patient_port():
    """Of a server that waits for headers as long as the product does, so that a busy machine is no slow client."""
    with server(dataclasses.replace(LIMITS, headers_seconds=ConnectionLimits().headers_seconds)) as port:
        yield port


def connect(port, address=""):
    """A connection, on request from another `address` of this machine: another client."""
    client = socket.create_connection(("127.0.0.1", port), source_address=(address, 0) if address else None)
    client.settimeout(10)
    return client


def answer(client):
    """What the server sends until it ends the connection."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            got += part
    return got


def status(port, message):
    """The status of the answer to a request, which asks for the connection's end.

    On a busy machine the short limit for headers may end a connection before they are read: this asks again.
    """
    until = time.monotonic() + 10
    while True:
        with connect(port) as client:
            client.sendall(message)
            if (got := answer(client)) or time.monotonic() > until:
                return int(got.split()[1])


@pytest.mark.parametrize(
    "start", [GET + b"X: ", GET, b"GET /", b""], ids=["a header", "headers", "the path", "nothing"]
)
@pytest.mark.parametrize("part", [64, 100_000])
def test_endless_headers(patient_port, start, part):
    """Of 32 kB and more, in many parts or few: they are refused, and nothing of them is kept."""
    with connect(patient_port) as client:
        client.sendall(start)
        more = (b"A: b\r\n" if start in (GET, b"") else b"a") * (1 + part // 6)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 32_768:
                sent += client.send(more)
        assert answer(client).split()[1] in ([b"431"] if start else [b"400", b"431"])
    assert status(patient_port, GET + b"Connection: close\r\nX: " + b"a" * 16_000 + b"\r\n\r\n") == 200


CHUNKED = b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_body_of_tiny_chunks(port):
    """Chunks of one byte kept the event loop busy: every other client waited for two seconds."""
    got = b""
    with connect(port) as client, contextlib.suppress(OSError):
        client.sendall(CHUNKED)
        client.sendall(b"1\r\na\r\n" * 20_000 + b"0\r\n\r\n")
        got = answer(client)
    assert got == b""


def test_endless_trailers(port):
    """Headers that follow a body of chunks."""
    begin = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: "
    with connect(port) as client:
        client.sendall(begin)
        with contextlib.suppress(OSError):
            for _ in range(20):
                client.sendall(b"a" * 100_000)
        answer(client)  # it ends


def test_headers_that_are_never_finished(port):
    """Byte by byte, each in time; the whole is not."""
    with connect(port) as client:
        begun = time.monotonic()
        client.settimeout(0.02)
        got = b""
        for byte in GET + b"X: " + b"a" * 1000:
            with contextlib.suppress(OSError):
                client.send(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                got = client.recv(1000)
                break
        assert got.split()[1] == b"408"
        assert time.monotonic() - begun < 3


@pytest.mark.parametrize("before", [b"", GET + b"\r\n"], ids=["new", "after an answer"])
def test_a_client_that_says_nothing(port, before):
    begun = time.monotonic()
    with connect(port) as client:
        client.sendall(before)
        got = answer(client)
    assert got.startswith(b"HTTP/1.1 200" if before else b"")
    assert time.monotonic() - begun < 3


def test_a_body_that_nobody_reads(port):
    """It trickles on after the answer."""
    begun = time.monotonic()
    with connect(port) as client:
        client.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        with pytest.raises(OSError):  # noqa: PT012
            while time.monotonic() - begun < 8:
                client.sendall(b"a")
                time.sleep(0.02)
    assert time.monotonic() - begun < 4


def test_a_client_that_takes_no_answer(port):
    """It is cut off; the others are answered meanwhile, and the server ends at once."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(GET.replace(b"/ ", b"/much ") + b"\r\n")
        assert status(port, GET + b"Connection: close\r\n\r\n") == 200
        time.sleep(0.8)
        client.settimeout(10)
        assert len(answer(client)) < 30_000_000


def test_many_requests_at_once(port):
    """On one connection: some are answered in order, and thousands end it."""
    with connect(port) as client:
        client.sendall((GET + b"\r\n") * 20 + GET + b"Connection: close\r\n\r\n")
        assert answer(client).count(b"HTTP/1.1 200") == 21
    with connect(port) as client:
        with contextlib.suppress(OSError):
            for _ in range(20):
                client.sendall((GET + b"\r\n") * 500)
        answer(client)  # it ends


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


@pytest.mark.parametrize("cut", [40, 150, 180])
def test_an_offer_to_upgrade_is_ignored(patient_port, cut):
    """`curl --http2` and Java's HttpClient make one. The body was dropped, and requests after it had no answer."""
    post = GET.replace(b"GET", b"POST") + OFFER + b"Content-Length: 5\r\n\r\nabcde"
    message = post + GET + OFFER + b"\r\n" + GET + b"Connection: close\r\n\r\n"
    with connect(patient_port) as client:
        client.sendall(message[:cut])
        time.sleep(0.01)
        client.sendall(message[cut:])
        answers = answer(client).split(b"HTTP/1.1 ")[1:]
    assert [(one[:3], one[-1:]) for one in answers] == [(b"200", b"5"), (b"200", b"0"), (b"200", b"0")]


def test_a_refusal_does_not_overtake_the_answer_before_it(patient_port):
    with connect(patient_port) as client:
        client.sendall(GET + b"\r\ngarbage garbage\r\n\r\n")
        assert b" 400 " not in answer(client)


def test_many_connections(port):
    """So many of one client and no more: another is told so, and one that ends makes room."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(port)) for _ in range(LIMITS.of_a_client)]
        with connect(port) as more:
            assert answer(more).startswith(b"HTTP/1.1 503")
        clients.pop().close()
        until = time.monotonic() + 5
        while (found := status(port, GET + b"Connection: close\r\n\r\n")) == 503 and time.monotonic() < until:
            time.sleep(0.05)
        assert found == 200


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback network has other addresses on Linux alone")
def test_connections_of_one_client_that_are_refused_keep_nobody_out(port):
    """Those that wait to be told counted among all, so that one address could fill the server."""
    with contextlib.ExitStack() as stack:
        for _ in range(LIMITS.connections + connections._TOLD + 10):
            stack.enter_context(connect(port, "127.0.0.2"))
        for _ in range(3):
            with connect(port) as client:
                client.sendall(GET + b"Connection: close\r\n\r\n")
                assert answer(client).startswith(b"HTTP/1.1 200")


def test_work_ends_when_its_client_goes(port):
    """Nobody would take the answer, and others would wait for it."""
    STATE.clear()
    with connect(port) as client:
        client.sendall(GET.replace(b"/ ", b"/endless ") + b"\r\n")
        wait_for(lambda: STATE == ["begun"])
    wait_for(lambda: STATE == ["begun", connections.CLIENT_GONE])


def test_reading_goes_on_after_a_large_body():
    """Which uvicorn pauses it for: that the client had gone was not seen before the answer."""
    app = Starlette(routes=[Route("/", endless, methods=["POST"])])
    settings = server_settings(app, "127.0.0.1", 0)
    settings.load()

    transport = mock.Mock(asyncio.Transport)
    transport.is_closing.return_value, transport.get_extra_info.return_value = False, None

    async def client():
        protocol = settings.http_protocol_class(config=settings, server_state=ServerState(), app_state={})
        protocol.connection_made(transport)
        STATE.clear()
        protocol.data_received(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 150000\r\n\r\n")
        await asyncio.sleep(0.01)
        protocol.data_received(bytes(150_000))
        while not STATE:
            await asyncio.sleep(0.01)
        assert transport.pause_reading.called
        assert not protocol.flow.read_paused
        protocol.connection_lost(None)
        while len(STATE) < 2:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(client(), 20))


def wait_for(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(("host", "client"), [
    ("192.0.2.1", "192.0.2.1"), ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"), ("fe80::1%eth0", "fe80::/64"), ("", ""),
])  # fmt: skip
def test_the_address_of_a_client(host, client):
    assert connections.client_of(host) == client


def test_the_server_ends_whatever_its_clients_do():
    """One has sent half of its headers, one half of its body, and one takes no answer."""
    with contextlib.ExitStack() as stack, server(ConnectionLimits(grace_seconds=0.3)) as port:
        for message in (GET, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\na", GET + b"\r\n"):
            stack.enter_context(connect(port)).sendall(message)
        time.sleep(0.1)
        begun = time.monotonic()
    assert time.monotonic() - begun < 8


@pytest.mark.parametrize("run", [uvloop.run, asyncio.run])
def test_a_new_client_does_not_wait_for_those_before_it(run):
    """The event loop accepts the clients that wait at once; libuv alone accepts one per iteration."""

    async def accept():
        accepted, iteration = [], 0

        class Noted(asyncio.Protocol):
            def connection_made(self, transport):
                accepted.append(iteration)

        with contextlib.ExitStack() as stack:
            listening = connections.listeners(socket.create_server(("127.0.0.1", 0), backlog=64))
            servers = [
                await asyncio.get_running_loop().create_server(Noted, sock=each, backlog=64) for each in listening
            ]
            for _ in range(24):
                stack.enter_context(socket.create_connection(listening[0].getsockname()))
            while len(accepted) < 24:
                iteration += 1
                assert iteration < 10_000
                await asyncio.sleep(0)
        for server in servers:
            server.close()
            await server.wait_closed()
        return accepted

    accepted = run(accept())
    assert accepted[-1] - accepted[0] <= 1

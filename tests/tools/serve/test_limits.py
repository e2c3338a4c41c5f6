"""What a client may do to a connection, over real ones."""

import contextlib
import socket
import threading
import time

import httpx2 as httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse

from imgclf_jax.tools.serve import limits
from imgclf_jax.tools.serve.limits import server_settings

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


@contextlib.contextmanager
def in_thread(application):
    """The port of a server in a thread of this process."""
    settings = server_settings(application)
    settings.timeout_graceful_shutdown = 1
    running = uvicorn.Server(settings)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not running.started:
                time.sleep(0.01)
            yield listening.getsockname()[1]
        finally:
            running.should_exit = True  # it ends whatever its clients do
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def port():
    """Of a server that gives a request 0.5 s, and that holds few large bodies."""
    application = FastAPI()
    application.add_middleware(limits.BoundedBodies)

    @application.get("/")
    @application.post("/")
    async def size(request: Request) -> int:
        return len(await request.body())

    @application.get("/much")
    async def much() -> PlainTextResponse:  # more than a socket holds while nobody reads
        return PlainTextResponse("x" * 30_000_000)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "SECONDS", 0.5)
        patch.setattr(limits, "MAX_BODIES", 1_000_000)
        with in_thread(application) as port:
            yield port


def connect(port):
    client = socket.create_connection(("127.0.0.1", port))
    client.settimeout(10)
    return client


def answer(client):
    """What the server sends until it ends the connection."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            got += part
    return got


@pytest.mark.parametrize("start", [GET + b"X: ", b"GET /"], ids=["a header", "the path"])
def test_endless_headers_are_refused(port, start):
    with connect(port) as client, contextlib.suppress(OSError):
        client.sendall(start + b"a" * 200_000)
        assert answer(client).split()[1:2] in ([], [b"400"])


@pytest.mark.parametrize("message", [b"", GET, POST + b"Content-Length: 9\r\n\r\na", GET + b"\r\nGET /"],
                         ids=["nothing", "headers", "a body", "half a request more"])  # fmt: skip
def test_a_client_that_sends_no_more_is_cut_off(port, message):
    begun = time.monotonic()
    with connect(port) as client:
        client.sendall(message)
        answer(client)
    assert time.monotonic() - begun < 8


@pytest.mark.parametrize("start", [GET + b"X: ", POST + b"Content-Length: 10000\r\n\r\n"], ids=["headers", "body"])
def test_a_client_that_trickles_is_cut_off(port, start):
    begun = time.monotonic()
    with connect(port) as client, pytest.raises(OSError):  # noqa: PT012
        client.sendall(start)
        while time.monotonic() - begun < 8:
            client.sendall(b"a")
            time.sleep(0.02)
    assert time.monotonic() - begun < 8


def test_a_client_that_takes_no_answer_is_cut_off(port):
    """And the others are answered meanwhile, many times on one connection."""
    with socket.socket() as client, httpx.Client() as other:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(GET.replace(b"/ ", b"/much ") + b"\r\n")
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            assert other.post(f"http://127.0.0.1:{port}", content=b"abc").text == "3"
            time.sleep(0.05)
        client.settimeout(10)
        assert len(answer(client)) < 30_000_000


def test_bodies_take_bounded_memory(port):
    """While large bodies hold what they may, one more is refused and small ones are answered; what ends makes room."""
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(connect(port))
            client.sendall(POST + b"Content-Length: 600000\r\n\r\n" + bytes(499_000))
        time.sleep(0.1)
        assert httpx.post(url, content=bytes(300_000)).status_code == 503
        assert httpx.post(url, content=bytes(200_000)).text == "200000"
    time.sleep(0.1)
    assert httpx.post(url, content=bytes(900_000)).text == "900000"

"""What a client may do to a connection, over real ones; small files that would take minutes to decode are refused."""

import asyncio
import contextlib
import io
import socket
import struct
import threading
import time
import zlib

import httpx2 as httpx
import pytest
import uvicorn
from cases import noise
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse
from PIL import Image

from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.serve import decoding, limits
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


def encode(image, form, **options):
    content = io.BytesIO()
    Image.fromarray(image).save(content, form, **options)
    return content.getvalue()


def jpeg(scans, size):
    """A progressive JPEG with this many scans; the added ones are empty, but pass over all pixels."""
    content = io.BytesIO()
    Image.new("L", (size, size)).save(content, "JPEG", progressive=True)
    data = content.getvalue()
    own = data.count(b"\xff\xda")
    begin = data.rindex(b"\xff\xda")
    last = data[begin:-2]
    return data[:-2] + last * (scans - own) + data[-2:]


def with_segments(data, *segments):
    """The JPEG file with these (marker, content) pairs at its start."""
    added = [bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content for marker, content in segments]
    return data[:2] + b"".join(added) + data[2:]


def with_profiles(count, profile):
    content = b"iCCP" + b"a\0\0" + zlib.compress(profile, 9)
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    data = encode(noise(8, 8, 3), "PNG")
    return data[:33] + chunk * count + data[33:]  # after the header


@pytest.mark.parametrize(("data", "words"), [
    (jpeg(300, 2000), "has 300 scans"),
    (with_segments(jpeg(501, 8), (0xFE, b"\xff\xd9")), "has 501 scans"),  # a comment does not end the image
    (jpeg(20, 8)[:-2] + b"\xff\xfe\0\2" * 100_000 + b"\xff\xd9", "more than 65,536 segments"),
    (with_profiles(3000, bytes(1_000_000)), "more than 16 color profiles"),
    (b"P3\n8 8 255\n" + b"#\n" * 2_000_000 + b"1 " * 192, "the PPM image is text"),
], ids=["large scans", "comment", "segments", "profiles", "text"])  # fmt: skip
def test_a_file_that_takes_minutes(data, words):
    begun = time.process_time()
    with pytest.raises(UserError, match=words):
        decoding.work_of(data)
    assert time.process_time() - begun < 2


def test_usual_files_pass():
    """Random bytes may contain the marker of a scan; photographs have 10 scans, and PNG images a color profile."""
    image = noise(1000, 1000, 3)
    assert decoding.work_of(encode(image, "PNG", compress_level=1)) == 10**6
    assert decoding.work_of(encode(image, "JPEG", progressive=True)) == 10**7
    assert decoding.work_of(encode(image, "JPEG", quality=95)) == 10**6
    photo, scans = encode(noise(8, 8, 3), "JPEG"), b"\xff\xda" * 501
    several = encode(noise(8, 8, 3), "MPO", save_all=True, append_images=[Image.new("L", (8, 8))])
    # A video after a phone's photograph, also if a fill byte stands before its end, thumbnails, other images of MPO.
    for data in (photo + scans, photo[:-2] + b"\xff" + photo[-2:] + scans, with_segments(photo, (0xE1, scans)),
                 several + scans):  # fmt: skip
        assert decoding.work_of(data) == 64
    assert decoding.work_of(with_profiles(1, b"profile")) == 64
    assert decoding.work_of(encode(noise(1, 900, 3), "PNG")) == 900**2 // 64  # an op may enlarge it


@pytest.mark.parametrize(("image", "at_once"), [(encode(noise(9, 9), "PNG"), True),
                                                (with_profiles(3, bytes(1_000_000)), False)])  # fmt: skip
def test_the_event_loop_decodes_tiny_images_that_unpack_to_little(image, at_once):
    thread = asyncio.run(decoding.Decoder().decode(image, lambda _: threading.current_thread()))
    assert (thread is threading.main_thread()) == at_once


def test_small_images_do_not_wait_for_large_ones():
    """More of them than may wait: another is refused, and one whose client has gone is never decoded."""
    large, small, go, begun = encode(noise(1200, 1200), "PNG"), encode(noise(80, 80), "PNG"), threading.Event(), []

    def make(image):
        if image is large:
            begun.append(image)
            assert go.wait(20)
        return len(image)

    async def clients():
        decoder = decoding.Decoder()
        tasks = [asyncio.create_task(decoder.decode(large, make)) for _ in range(decoding._MAX_WAITING)]
        async with asyncio.timeout(20):
            while decoder._waiting < len(tasks):
                await asyncio.sleep(0.01)
            assert await asyncio.gather(*(decoder.decode(small, make) for _ in range(10))) == [len(small)] * 10
            with pytest.raises(HTTPException, match="503"):
                await decoder.decode(large, make)
            tasks.pop().cancel()
            go.set()
            assert await asyncio.gather(*tasks) == [len(large)] * len(tasks)
            assert await decoder.alone(large, make) == len(large)
        decoder.close()
        return len(tasks)

    assert asyncio.run(clients()) + 1 == len(begun)

"""Hostile clients of one server, by a seeded plan, beside a polite one that must not notice them: see attack.py."""

import collections
import contextlib
import http.client
import io
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

CLIENTS = 6  # hostile ones at once, each with an address of its own
MEMORY, SLOW, END = 2 << 30, 2.0, 10.0  # bytes of the server; seconds of an answer to the polite client; until its end
PATIENCE = 5.0  # seconds that a hostile client takes at most
FORM = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
PART = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n%s\r\n'


def png(side: int = 12, seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side), np.uint8)).save(file, "png")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of side² black pixels, of which a thousand take one byte."""
    packer, lines = zlib.compressobj(9), bytes(side + 1) * 100
    packed = b"".join(packer.compress(lines) for _ in range(side // 100)) + packer.flush()
    parts = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b""))
    pieces = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def jpeg_of_scans(side: int) -> bytes:
    """A JPEG image of side² pixels and 490 scans, each of which covers all of them."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + scan * 480 + b"\xff\xd9"


def with_length(head: bytes, body: bytes) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def post(*images: bytes) -> bytes:
    """A request of images."""
    return with_length(FORM, b"".join(PART % image for image in images) + b"--x--\r\n")


class Hostile:
    """A client from 127.0.0.`number`; `rng` decides what it does next. Each attack is one short method."""

    def __init__(self, port: int, number: int, rng: random.Random, bombs: list[bytes]):
        self.port, self.address, self.rng, self.bombs = port, f"127.0.0.{number}", rng, bombs

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE, (self.address, 0))

    def send(self, *pieces: bytes, pause: float = 0.0, read: int = 65536) -> None:
        """Sends pieces until the server has enough of them or the client has, then reads some of the answer."""
        until = time.monotonic() + PATIENCE
        with self.connect() as connection:
            with contextlib.suppress(ConnectionError):  # the server may answer early and close
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(pause)
                    if time.monotonic() > until:
                        break
            connection.settimeout(self.rng.choice((0.1, 1.0)))
            connection.recv(read)

    def slow_headers(self) -> None:
        self.send(*(b"%c" % byte for byte in FORM), pause=0.1)

    def slow_body(self) -> None:
        self.send(FORM + b"Content-Length: 1000\r\n\r\n" + PART[:-4], *[b"x"] * 100, pause=0.1)

    def endless_body(self) -> None:
        head = FORM + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(PART) - 4, PART[:-4])
        self.send(head, *[b"10000\r\n" + bytes(65536) + b"\r\n"] * 500)

    def endless_header(self) -> None:
        self.send(FORM, *[b"X-%d: " % i + b"a" * 4000 + b"\r\n" for i in range(200)])

    def large_claims(self) -> None:
        claim = self.rng.choice((b"-1", b"9" * 30, b"1e9", b"20000001", b"19999999", b"5\r\nContent-Length: 6", b"0x5"))
        self.send(FORM + b"Content-Length: " + claim + b"\r\n\r\n", b"x" * 100, pause=0.2)

    def tiny_chunks(self) -> None:
        self.send(FORM + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * self.rng.choice((10, 50_000)))

    def many_connections(self) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(self.rng.choice((20, 200))):
                stack.enter_context(self.connect()).send(self.rng.choice((b"", b"GET / HT", FORM)))
            time.sleep(self.rng.choice((0.1, 2.0)))

    def broken_image(self) -> None:
        content = bytearray(png(self.rng.choice((1, 12, 300)), 1))
        for _ in range(self.rng.choice((1, 5, 50))):
            content[self.rng.randrange(len(content))] = self.rng.randrange(256)
        self.send(post(bytes(content[: self.rng.choice((len(content), len(content) // 2))])))

    def decompression_bomb(self) -> None:
        request = post(self.rng.choice(self.bombs))
        explain = request.replace(b"/predict", b"/explain", 1).replace(b'"images"', b' "image"', 1)
        self.send(self.rng.choice((request, explain)))

    def form_of_bombs(self) -> None:
        self.send(post(*[self.rng.choice(self.bombs)] * self.rng.choice((2, 64))))

    def huge_form(self) -> None:
        name = b"n" * self.rng.choice((1, 100_000))
        part = b'--x\r\nContent-Disposition: form-data; name="' + name + b'"; filename="a"\r\n\r\n%s\r\n' % png()
        body = part * (3_000_000 // len(part)) + self.rng.choice((b"--x--\r\n", b"", b"--x\r\n"))
        self.send(with_length(FORM, body))

    def many_images(self) -> None:
        self.send(post(*[png(200)] * 64))

    def large_images(self) -> None:
        self.send(post(*[png(1500)] * self.rng.choice((1, 8))))

    def bad_form(self) -> None:
        body = self.rng.choice((
            b"--x\r\n" + b"a: b\r\n" * 100_000, b"--x\r\na: " + b"b" * 1_000_000, b"\r\n--" * 500_000,
            PART[:-4] + b"\r\n--" * 500_000, PART % b"" * 20_000, PART.replace(b"filename", b"x") % b"" * 10_000,
            b"--x--\r\n", b"x" * 1000, self.rng.randbytes(100_000),
        ))  # fmt: skip
        kind = self.rng.choice((b"multipart/form-data; boundary=x", b"application/json", b"multipart/form-data",
                                b"application/x-www-form-urlencoded"))  # fmt: skip
        self.send(with_length(FORM.replace(b"multipart/form-data; boundary=x", kind), body))

    def abrupt_close(self) -> None:
        with self.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(post(png())[: self.rng.choice((30, 90, 10**6))])
            time.sleep(self.rng.choice((0.0, 0.01)))

    def pipeline(self) -> None:
        route = self.rng.choice((b"/", b"/openapi.json", b"/docs", b"/nothing", b"/model"))
        requests = (b"GET " + route + b" HTTP/1.1\r\nHost: a\r\n\r\n") * 300
        self.send(self.rng.choice((requests, post(png()) * 50)), pause=self.rng.choice((0.0, 3.0)))

    def odd_request(self) -> None:
        lines = (b"GET http://evil/ HTTP/1.1", b"CONNECT evil:443 HTTP/1.1", b"GET /../../etc/passwd HTTP/1.1",
                 b"\x16\x03\x01", b"PRI * HTTP/2.0", b"GET / HTTP/0.9", b"TRACE / HTTP/1.1",
                 b"POST /predict?top_k=" + b"9" * 5000 + b" HTTP/1.1",
                 b"GET /" + b"a" * 100_000 + b" HTTP/1.1", b"POST /explain?class=%00%ff&format=x HTTP/1.1",
                 b"OPTIONS /predict HTTP/1.1", b"GET /%0d%0aX:%20y HTTP/1.1")  # fmt: skip
        heads = (b"Host: evil.example", b"Origin: https://evil.example", b"Host: a\r\nHost: b", b"Expect: 100-continue",
                 b"Upgrade: websocket\r\nConnection: Upgrade", b"Transfer-Encoding: chunked\r\nContent-Length: 5",
                 b"\x00: \xff",
                 b"X-Forwarded-For: 127.0.0.1", b"Content-Encoding: gzip", b"Connection: close")  # fmt: skip
        self.send(self.rng.choice(lines) + b"\r\n" + self.rng.choice(heads) + b"\r\n\r\n", self.rng.randbytes(50))

    def act(self) -> str:
        """Does one of the above, and returns its name. Whatever the server answers is right."""
        attacks: list[Callable[[], None]] = [
            self.slow_headers, self.slow_body, self.endless_body, self.endless_header, self.large_claims,
            self.tiny_chunks, self.many_connections, self.broken_image, self.decompression_bomb, self.form_of_bombs,
            self.huge_form, self.many_images, self.large_images, self.bad_form, self.abrupt_close,
            self.pipeline, self.odd_request,
        ]  # fmt: skip
        attack = self.rng.choice(attacks)
        with contextlib.suppress(OSError):
            attack()
        return attack.__name__


def memory(pid: int) -> int:
    """Bytes of a process and its children in memory."""
    with contextlib.suppress(OSError):
        folder = Path("/proc", str(pid))
        own = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return own + sum(memory(int(child)) for child in (folder / f"task/{pid}/children").read_text().split())
    return 0


def start(root: Path, folder: Path, flags: tuple[str, ...]) -> tuple[subprocess.Popen[bytes], int]:
    """Trains a tiny run, and serves it; the server and its port. Its log is `folder`/log."""
    command = [sys.executable, str(root / "launch.py")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
    with (folder / "log").open("wb") as log:
        subprocess.run([*command, "train", f"--workdir={folder}/run", *flags], env=environment, check=True, stdout=log,
                       stderr=log)  # fmt: skip
        served = subprocess.Popen([*command, "serve", f"--workdir={folder}/run", "--port=0"], env=environment,
                                  stdout=log, stderr=log)  # fmt: skip
    while not (found := re.search(r"at http://127\.0\.0\.1:(\d+)", (folder / "log").read_text())):
        if served.poll() is not None:
            raise SystemExit(f"the server does not start: {(folder / 'log').read_text()}")
        time.sleep(0.1)
    return served, int(found[1])


def ask(port: int) -> tuple[int | str, float]:
    """Status, or why there is none, and seconds of a polite request."""
    began, connection = time.monotonic(), http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        _, _, body = post(png()).partition(b"\r\n\r\n")
        connection.request("POST", "/predict", body, {"Content-Type": "multipart/form-data; boundary=x"})
        answer = connection.getresponse()
        answer.read()
        return answer.status, time.monotonic() - began
    except OSError as e:
        return str(e), time.monotonic() - began
    finally:
        connection.close()


def attack_server(seconds: float, seed: int, root: Path, folder: Path, flags: tuple[str, ...]) -> int:
    """Lets hostile clients loose on a server until the time is over; prints the verdict; the number of faults."""
    server, port = start(root, folder, flags)
    bombs = [*(bomb(side) for side in (1000, 3000, 8000, 30_000)), jpeg_of_scans(400), jpeg_of_scans(1400)]
    until, count, faults = time.monotonic() + seconds, collections.Counter[str](), collections.Counter[str]()
    now, slowest, most, answers = [""] * CLIENTS, 0.0, 0, 0

    def loose(number: int) -> None:
        one = Hostile(port, number + 2, random.Random(f"{seed}/{number}"), bombs)
        while time.monotonic() < until:
            now[number] = one.act()
            count[now[number]] += 1

    threads = [threading.Thread(target=loose, args=(number,)) for number in range(CLIENTS)]
    print(f"serving in {folder}", flush=True)
    for thread in threads:
        thread.start()
    while time.monotonic() < until and server.poll() is None:
        status, took = ask(port)
        slowest, most, answers = max(slowest, took), max(most, memory(server.pid)), answers + 1
        kinds = {"refused": status != 200, "slow": took > SLOW, "memory": memory(server.pid) > MEMORY}
        for kind in (kind for kind, wrong in kinds.items() if wrong):
            faults[kind] += 1
            size = f"{memory(server.pid) >> 20} MiB"
            print(f"{kind.upper()}: status {status} in {took:.1f} s, {size}, during {', '.join(now)}", flush=True)
        time.sleep(max(0.0, 1 - took))
    for thread in threads:
        thread.join()
    began = time.monotonic()
    faults["ended early"] += server.poll() is not None
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(END)
    except subprocess.TimeoutExpired:
        faults["does not end"] += 1
        server.kill()
    ended = time.monotonic() - began
    text = (folder / "log").read_text(errors="replace")
    faults["traceback"] += text.count("Traceback (most recent call last)")
    print(f"{count.total()} attacks and {answers} polite requests: the slowest answer took {slowest:.2f} s, the server "
          f"{most >> 20} MiB and {ended:.1f} s to end; faults: {dict(+faults)}; {dict(sorted(count.items()))}; log in "
          f"{folder}")  # fmt: skip
    return faults.total()

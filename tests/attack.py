"""Lets hostile clients loose on a server by a seeded plan, beside a polite one that must not notice them.

    uv run python tests/attack.py --seconds 3600

The verdict counts the faults, and the exit status is 1 if there is any: the polite client is refused or waits for more
than SLOW seconds, the server takes more than MEMORY, ends early or not at all, or its log has a traceback.
"""

import collections
import contextlib
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
from pathlib import Path

import httpx2 as httpx
import launched
import numpy as np
from cases import flags
from PIL import Image

ROOT = Path(__file__).parent.parent
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


def with_length(head: bytes, body: bytes) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def post(*images: bytes) -> bytes:
    """A request of images."""
    return with_length(FORM, b"".join(PART % image for image in images) + b"--x--\r\n")


def broken(seed: int) -> bytes:
    """A PNG image with some bytes changed, perhaps cut in half."""
    rng = random.Random(seed)
    content = bytearray(png(rng.choice((1, 12, 300)), 1))
    for _ in range(rng.choice((1, 5, 50))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content[: rng.choice((len(content), len(content) // 2))])


Requests = dict[str, list[tuple[list[bytes], float]]]


def requests() -> Requests:
    """By name: what a hostile client may send on one connection, in pieces, and the seconds between them."""
    start, chunked = PART[:-4], FORM + b"Transfer-Encoding: chunked\r\n\r\n"
    bombs = [post(*[bomb(side)] * count) for side in (1000, 3000, 8000, 30_000) for count in (1, 64)]
    bombs += [one.replace(b"/predict", b"/explain", 1).replace(b'"images"', b' "image"', 1) for one in bombs[::2]]
    forms = (
        b"--x\r\n" + b"a: b\r\n" * 100_000, b"--x\r\na: " + b"b" * 1_000_000, start + b"\r\n--" * 500_000, b"--x--\r\n",
        PART % b"" * 20_000, PART.replace(b"filename", b"x") % b"" * 10_000, random.Random(0).randbytes(100_000),
        PART.replace(b"images", b"n" * 100_000) % png() * 30,
    )  # fmt: skip
    claims = (b"-1", b"9" * 30, b"1e9", b"20000001", b"19999999", b"5\r\nContent-Length: 6", b"0x5")
    odd = (
        b"GET http://evil/ HTTP/1.1", b"CONNECT evil:443 HTTP/1.1", b"GET /../../etc/passwd HTTP/1.1", b"\x16\x03\x01",
        b"PRI * HTTP/2.0", b"POST /predict?top_k=" + b"9" * 5000 + b" HTTP/1.1", b"GET /" + b"a" * 100_000,
        b"POST /explain?class=%00%ff HTTP/1.1", b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade",
        b"POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5",
    )  # fmt: skip
    pipelines = (b"GET /docs HTTP/1.1\r\nHost: a\r\n\r\n" * 300, post(png()) * 50)
    return {
        "slow headers": [([b"%c" % byte for byte in FORM], 0.1)],
        "slow body": [([FORM + b"Content-Length: 1000\r\n\r\n" + start, *[b"x"] * 100], 0.1)],
        "endless body": [([chunked, *[b"10000\r\n" + bytes(65536) + b"\r\n"] * 500], 0.0)],
        "tiny chunks": [([chunked + b"1\r\nx\r\n" * 50_000], 0.0)],
        "endless headers": [([FORM, *[b"X-%d: " % i + b"a" * 4000 + b"\r\n" for i in range(200)]], 0.0)],
        "large images": [([post(*images)], 0.0) for images in ([png(200)] * 64, [png(1500)] * 8)],
        "broken image": [([post(broken(seed))], 0.0) for seed in range(50)],
        "decompression bomb": [([one], 0.0) for one in bombs],
        "bad form": [([with_length(FORM, body)], 0.0) for body in forms],
        "large claim": [([FORM + b"Content-Length: %s\r\n\r\n" % claim, b"x" * 100], 0.2) for claim in claims],
        "odd request": [([line + b"\r\nHost: a\r\n\r\n"], 0.0) for line in odd],
        "pipeline": [([one], 3.0) for one in pipelines],
    }


def hostile(port: int, number: int, rng: random.Random, sent: Requests) -> str:
    """One act of a client from 127.0.0.`number`, and its name. Whatever the server answers is right."""
    name = rng.choice((*sent, "many connections", "abrupt close"))

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), PATIENCE, (f"127.0.0.{number}", 0))

    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        connection = stack.enter_context(connect())
        if name == "many connections":
            for _ in range(rng.choice((20, 200))):
                stack.enter_context(connect()).send(rng.choice((b"", b"GET / HT", FORM)))
            time.sleep(rng.choice((0.1, 2.0)))
        elif name == "abrupt close":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(post(png())[: rng.choice((30, 90, 10**6))])
            time.sleep(rng.choice((0.0, 0.01)))
        else:
            pieces, pause = rng.choice(sent[name])
            until = time.monotonic() + PATIENCE
            with contextlib.suppress(ConnectionError):  # the server may answer early and close
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(pause)
                    if time.monotonic() > until:
                        break
            connection.settimeout(rng.choice((0.1, 1.0)))
            connection.recv(65536)
    return name


def memory(pid: int) -> int:
    """Bytes of a process in memory; 0 where it has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def start(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Trains a tiny run, and serves it; the server and its port. Its log is `folder`/log."""
    command, workdir = [sys.executable, str(ROOT / "launch.py")], f"--workdir={folder}/run"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
    with (folder / "log").open("wb") as log:
        logged = {"env": environment, "stdout": log, "stderr": log}
        subprocess.run([*command, "train", workdir, *flags("schedule=constant(1e-2)")], check=True, **logged)
        served = subprocess.Popen([*command, "serve", workdir, "--port=0"], **logged)
    while not (found := re.search(r"at http://127\.0\.0\.1:(\d+)", (folder / "log").read_text())):
        if served.poll() is not None:
            raise SystemExit(f"the server does not start: {(folder / 'log').read_text()}")
        time.sleep(0.1)
    return served, int(found[1])


def ask(port: int) -> tuple[int | str, float]:
    """Status, or why there is none, and seconds of a polite request."""
    began = time.monotonic()
    try:
        url = f"http://127.0.0.1:{port}/predict"
        return httpx.post(url, files={"images": png()}, timeout=30).status_code, time.monotonic() - began
    except httpx.HTTPError as e:
        return str(e), time.monotonic() - began


def attack(seconds: float, seed: int, folder: Path) -> int:
    """Lets hostile clients loose on a server until the time is over; prints the verdict; the number of faults."""
    server, port = start(folder)
    sent = requests()
    until, count, faults = time.monotonic() + seconds, collections.Counter[str](), collections.Counter[str]()
    now, slowest, most, answers = [""] * CLIENTS, 0.0, 0, 0

    def loose(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        while time.monotonic() < until:
            now[number] = hostile(port, number + 2, rng, sent)
            count[now[number]] += 1

    threads = [threading.Thread(target=loose, args=(number,)) for number in range(CLIENTS)]
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


if __name__ == "__main__":
    sys.exit(launched.main(__doc__, "attack", attack))

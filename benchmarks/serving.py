"""Load-tests `serve`: throughput and latency of one and of many clients, in turns, and the server's memory.

    uv run --extra serve benchmarks/serving.py --workdir runs/digits

It starts the server on a run's work directory, sends random PNG images of the run's size, and counts answers. With
--wrk, the program wrk (github.com/wg/wrk) sends them, which leaves more CPU time to a server on the same cores. On
Linux, the CPU milliseconds per answer are split by thread: "loop" is HTTP, "workers" decode images and call JAX, and
"xla" is the rest, which is the network.
"""

import argparse
import asyncio
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).parents[1]


def requests(shape: list[int], count: int = 64) -> list[bytes]:
    """Makes complete HTTP requests, each with a different image."""
    rng, out = np.random.default_rng(0), []
    for _ in range(count):
        content = io.BytesIO()
        pixels = rng.integers(256, size=shape, dtype=np.uint8)
        Image.fromarray(pixels[..., 0] if shape[-1] == 1 else pixels).save(content, "PNG")
        body = content.getvalue()
        out.append(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return out


async def client(port: int, messages: list[bytes], until: float, times: list[float]) -> int:
    """Sends requests in sequence on one connection; returns the number that failed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    failed = 0
    while time.monotonic() < until:
        begun = time.monotonic()
        writer.write(messages[len(times) % len(messages)])
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head.lower())[1])  # type: ignore[index]
        await reader.readexactly(length)
        failed += not head.startswith(b"HTTP/1.1 200")
        times.append(time.monotonic() - begun)
    writer.close()
    return failed


async def load(port: int, messages: list[bytes], clients: int, seconds: float) -> dict[str, float]:
    """Measures `clients` concurrent clients for `seconds`."""
    until, times = time.monotonic() + seconds, []
    failed = sum(await asyncio.gather(*(client(port, messages, until, times) for _ in range(clients))))
    return {"clients": clients, "answers": len(times), "failed": failed, "a_second": round(len(times) / seconds, 1),
            "median_ms": round(1000 * float(np.median(times)), 2),
            "p99_ms": round(1000 * float(np.percentile(times, 99)), 2)}  # fmt: skip


# The script of wrk: bodies from files, results as one line of JSON.
SCRIPT = """
local bodies, n = {}, 0
for i = 0, COUNT - 1 do local f = io.open("FOLDER/" .. i, "rb"); bodies[i] = f:read("*a"); f:close() end
request = function()
  n = n + 1
  return wrk.format("POST", "/predict", {["Host"] = "localhost"}, bodies[n % COUNT])
end
done = function(s, latency, _)
  local e = s.errors
  print(string.format('{"answers": %d, "failed": %d, "a_second": %.1f, "median_ms": %.2f, "p99_ms": %.2f}', s.requests,
    e.connect + e.read + e.write + e.status + e.timeout, 1e6 * s.requests / s.duration,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
"""


def wrk_load(port: int, messages: list[bytes], clients: int, seconds: float) -> dict[str, float]:
    """Measures like `load`, with wrk. Requests over two seconds count as failed."""
    with tempfile.TemporaryDirectory() as folder:
        for i, message in enumerate(messages):
            Path(folder, str(i)).write_bytes(message.partition(b"\r\n\r\n")[2])
        script = Path(folder, "script.lua")
        script.write_text(SCRIPT.replace("COUNT", str(len(messages))).replace("FOLDER", folder))
        words = ["wrk", "-t1", f"-c{clients}", f"-d{seconds:g}s", "-s", str(script), f"http://127.0.0.1:{port}"]
        out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    [line] = [line for line in out.splitlines() if line.startswith("{")]
    return {"clients": clients, **json.loads(line)}


def processor_seconds(server: psutil.Process) -> Counter[str]:
    """CPU seconds of the server, in total and by kind of thread."""
    times, parts = server.cpu_times(), Counter[str]()
    parts["all"] = times.user + times.system
    for thread in server.threads():
        name = Path(f"/proc/{server.pid}/task/{thread.id}/comm")
        if thread.id == server.pid:
            kind = "loop"
        elif not name.exists():
            continue
        else:
            kind = "workers" if name.read_text().startswith("python") else "xla"
        parts[kind] += thread.user_time + thread.system_time
    return parts


def measure(server: psutil.Process, work: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Returns the result of `work`, with the server's CPU milliseconds per answer and its memory."""
    before = processor_seconds(server)
    result = work()
    took = {kind: seconds - before[kind] for kind, seconds in processor_seconds(server).items()}
    took_ms = {kind: round(1000 * seconds / result["answers"], 3) for kind, seconds in took.items()}
    return result | {"cpu_ms": took_ms, "memory_mb": round(server.memory_info().rss / 1e6, 1)}


def main() -> None:
    """Prints one line per turn, the ratio, and the server's memory before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="the run to serve")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--wrk", action="store_true", help="have wrk send the requests")
    asked = parser.parse_args()
    shape = json.loads((Path(asked.workdir) / "provenance.json").read_text())["data"]["image_shape"]
    command = [sys.executable, str(ROOT / "launch.py"), "serve", f"--workdir={asked.workdir}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        port = int(re.search(r":(\d+); press Ctrl-C", server.stdout.readline())[1])  # type: ignore[index]
        process, messages, ratios = psutil.Process(server.pid), requests(shape), []

        def send(clients: int, seconds: float) -> dict[str, float]:
            if asked.wrk:
                return wrk_load(port, messages, clients, seconds)
            return asyncio.run(load(port, messages, clients, seconds))

        send(asked.clients, 2.0)
        before = process.memory_info().rss
        for _ in range(asked.turns):
            alone, together = (measure(process, lambda n=n: send(n, asked.seconds)) for n in (1, asked.clients))
            ratios.append(together["a_second"] / alone["a_second"])
            print(json.dumps(alone), json.dumps(together), f"ratio {ratios[-1]:.2f}", sep="\n", flush=True)
        after = process.memory_info().rss
        server.terminate()
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"ratios {shown}; memory {before / 1e6:.1f} to {after / 1e6:.1f} MB; status {server.wait(30)}")


if __name__ == "__main__":
    main()

"""`serve` under load: many clients at once beside one by one, in turns, and the server's memory.

    uv run --extra serve benchmarks/serving.py --workdir runs/digits

It starts the server on a run's work directory, sends random images of the run's size as PNG, and counts answers.
"""

import argparse
import asyncio
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).parents[1]


def requests(shape: list[int], count: int = 64) -> list[bytes]:
    """Whole HTTP requests, each with another image."""
    rng, out = np.random.default_rng(0), []
    for _ in range(count):
        content = io.BytesIO()
        pixels = rng.integers(256, size=shape, dtype=np.uint8)
        Image.fromarray(pixels[..., 0] if shape[-1] == 1 else pixels).save(content, "PNG")
        body = content.getvalue()
        out.append(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return out


async def client(port: int, messages: list[bytes], until: float, times: list[float]) -> int:
    """Sends requests one after the other on one connection; gives how many failed."""
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
    """What `clients` at once get in so many seconds."""
    until, times = time.monotonic() + seconds, []
    failed = sum(await asyncio.gather(*(client(port, messages, until, times) for _ in range(clients))))
    return {"clients": clients, "answers": len(times), "failed": failed, "a_second": round(len(times) / seconds, 1),
            "median_ms": round(1000 * float(np.median(times)), 2),
            "p99_ms": round(1000 * float(np.percentile(times, 99)), 2)}  # fmt: skip


def measured(server: psutil.Process, work: Coroutine[Any, Any, dict[str, float]]) -> dict[str, float]:
    """What `work` gives, and the milliseconds of processors that the server took for an answer."""
    before = server.cpu_times()
    result = asyncio.run(work)
    after = server.cpu_times()
    seconds = after.user + after.system - before.user - before.system
    return result | {"cpu_ms": round(1000 * seconds / result["answers"], 3)}


def main() -> None:
    """Prints a line for each turn, the ratio, and the server's memory before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="the run that is served")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    shape = json.loads((Path(asked.workdir) / "provenance.json").read_text())["data"]["image_shape"]
    command = [sys.executable, str(ROOT / "launch.py"), "serve", f"--workdir={asked.workdir}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        port = int(re.search(r":(\d+); Ctrl-C", server.stdout.readline())[1])  # type: ignore[index]
        process, messages, ratios = psutil.Process(server.pid), requests(shape), []
        asyncio.run(load(port, messages, asked.clients, 2.0))
        before = process.memory_info().rss
        for _ in range(asked.turns):
            alone, together = (measured(process, load(port, messages, n, asked.seconds)) for n in (1, asked.clients))
            ratios.append(together["a_second"] / alone["a_second"])
            print(json.dumps(alone), json.dumps(together), f"ratio {ratios[-1]:.2f}", sep="\n", flush=True)
        after = process.memory_info().rss
        server.terminate()
        said = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"ratios {said}; memory {before / 1e6:.1f} to {after / 1e6:.1f} MB; status {server.wait(30)}")


if __name__ == "__main__":
    main()

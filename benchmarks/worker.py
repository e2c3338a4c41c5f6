"""The process of one variant: `python worker.py VARIANT NETWORK IMAGES`, started by `workers.Worker`.

It prints a line {"versions", "device", "rss_mb"} once its framework is imported. For each request on stdin,
{"mode": "train", "batch_size": 128, "seconds": 2.0}, it prints a line {"images_per_second", "steps", "rss_mb"}. On
failure it prints a line with "error" instead. It exits when stdin closes.
"""

import importlib
import importlib.metadata
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

from networks import NETWORKS, examples
from variants import MEASURED, Measure


def main(name: str, network_name: str, count: int) -> None:
    """Answers requests until standard input ends."""
    variant, network = MEASURED[name], NETWORKS[network_name]
    if variant.own:
        sys.path.insert(0, str(Path(__file__).parents[1]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps output that a framework prints apart from answers

    def answer(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=answers, flush=True)

    try:
        if variant.own:
            from imgclf_jax.run import environment

            environment.prepare(True)  # before JAX is imported
        module = importlib.import_module(variant.module)
        prepare = module.open_variant(network, **variant.options)
        answer({"versions": versions(variant.packages), "device": module.device(), "rss_mb": peak_rss()})
    except Exception as e:
        traceback.print_exc()
        answer({"error": reason(e)})
        return

    data = examples(network, count)
    prepared: dict[tuple[str, int], Measure] = {}
    for line in sys.stdin:
        request = json.loads(line)
        mode, batch_size = request["mode"], request["batch_size"]
        try:
            if (mode, batch_size) not in prepared:
                prepared[mode, batch_size] = prepare(data, mode, batch_size)
            amount, seconds = prepared[mode, batch_size](request["seconds"])
            answer(
                {
                    f"{variant.unit}_per_second": amount / seconds,
                    "steps": round(amount / max(batch_size, 1)) if variant.unit == "images" else None,
                    "rss_mb": peak_rss(),
                }
            )
        except Exception as e:
            traceback.print_exc()
            answer({"error": reason(e)})


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The versions of these packages, if installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_rss() -> float:
    """The peak memory of this process in MB.

    Not from getrusage on Linux, where the count starts with the memory of the parent at the fork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def reason(e: Exception) -> str:
    """Formats an error as one table cell."""
    first = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
    return f"{type(e).__name__}: {first}"[:200]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)  # some frameworks' threads take long to end

"""Wall time of whole processes, accuracy and memory on Fashion-MNIST, compared with the Keras example.

    uv run --group peers benchmarks/accuracy.py [--manual_dir=FOLDER with the four original .gz files]

Each run is a separate process, including imports, compilation and evaluation: the Keras example (keras_example.py), its
network and recipe here (configs/fashion_mnist.py) and configs/fashion_mnist_fast.py, in float32 and in bfloat16. For
each seed they run in turn, in reverse order for odd seeds; ratios are taken within a seed. Each config has its own
cache folder, which one more run fills before the seeds: the cold time. The TFDS data set is prepared before any
measurement.

Writes accuracy.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import cell, machine, now, spread
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
KERAS, FAST = "Keras example", "fashion_mnist_fast.py"
CONFIGS = {
    FAST: ["--config=configs/fashion_mnist_fast.py"],
    f"{FAST} float32": ["--config=configs/fashion_mnist_fast.py", "--config.precision=float32"],
    "fashion_mnist.py": ["--config=configs/fashion_mnist.py"],
    "fashion_mnist.py bfloat16": ["--config=configs/fashion_mnist.py", "--config.precision=bfloat16"],
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags; exits if they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--manual_dir", default="", help="folder of the original files, for offline machines")
    parser.add_argument("--runs", default=",".join([KERAS, *CONFIGS]), help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args(argv)
    args.runs = args.runs.split(",")
    if wrong := [name for name in args.runs if name not in (KERAS, *CONFIGS)]:
        parser.error(f"unknown run {wrong[0]!r}")
    args.manual_dir = str(Path(args.manual_dir).resolve()) if args.manual_dir else ""
    return args


def run(name: str, seed: int, manual_dir: str, cache: str) -> dict[str, float]:
    """Runs one process; returns its {"seconds", "accuracy", "memory_mb"}."""
    with tempfile.TemporaryDirectory() as directory:
        if name == KERAS:
            example = "benchmarks/peers/keras_example.py"
            command = [sys.executable, example, f"--seed={seed}", f"--manual_dir={manual_dir}"]
        else:
            command = [sys.executable, "launch.py", "train", *CONFIGS[name], f"--workdir={directory}/run"]
            command += [f"--config.seed={seed}", f"--config.data.manual_dir={manual_dir}"]
        environment = os.environ | {"XDG_CACHE_HOME": cache}
        with (Path(directory) / "out").open("w+") as out:
            began = time.perf_counter()
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            out.seek(0)
            text = out.read()
        if status:
            raise SystemExit(f"{' '.join(command)} failed:\n{text}")
        if name == KERAS:
            accuracy = json.loads(text.splitlines()[-1])["accuracy"]
        else:
            accuracy = json.loads(Path(directory, "run", "result.json").read_text())["test"]["accuracy"]
    return {"seconds": seconds, "accuracy": accuracy, "memory_mb": usage.ru_maxrss / 1024}


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measures the cold runs, then every run with every seed."""
    results: dict[str, Any] = {"machine": machine(), "began": now(), "argv": sys.argv, "cold": {}, "warm": {}}

    def one(name: str, seed: int, cache: str) -> dict[str, float]:
        result = run(name, seed, args.manual_dir, cache)
        console.print(f"{name}, seed {seed}: {result['seconds']:.1f} s, accuracy {result['accuracy']:.4f}")
        return result

    with tempfile.TemporaryDirectory() as caches:
        run(FAST, 0, args.manual_dir, f"{caches}/preparation")  # prepares the data set if needed
        for name in args.runs:
            if name != KERAS:
                results["cold"][name] = one(name, 0, f"{caches}/{name}")
        for seed in range(args.seeds):
            for name in args.runs if seed % 2 == 0 else args.runs[::-1]:
                results["warm"].setdefault(name, []).append(one(name, seed, f"{caches}/{name}"))
    return results


def report(results: dict[str, Any], console: Console) -> None:
    """Prints a table of means and ratios to the Keras example."""
    table = Table(title=f"Fashion-MNIST on {results['machine']['cpu']}, {results['machine']['cores']} cores")
    table.add_column("run", no_wrap=True)
    for column in ("accuracy, mean (standard deviation)", "seconds", "cold", "Keras's time to it", "MB at most"):
        table.add_column(column, justify="right")
    keras = results["warm"].get(KERAS)
    for name, runs in results["warm"].items():
        accuracies, seconds, memory = ([r[key] for r in runs] for key in ("accuracy", "seconds", "memory_mb"))
        cold = results["cold"].get(name)
        ratios = [k["seconds"] / r["seconds"] for k, r in zip(keras, runs, strict=True)] if keras else []
        table.add_row(
            name,
            f"{statistics.mean(accuracies):.4f} ({statistics.stdev(accuracies) if len(runs) > 1 else 0:.4f})",
            cell(spread(seconds), ".1f"),
            f"{cold['seconds']:.1f}" if cold else "",
            cell(spread(ratios), ".2f") if name != KERAS else "",
            f"{max(memory):,.0f}",
        )
    console.print(table)


def main() -> None:
    args, console = parse(sys.argv[1:]), Console()
    results = measure(args, console)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "accuracy.json").write_text(json.dumps(results, indent=2) + "\n")
    report(results, Console(width=None if console.is_terminal else 160))
    console.print(f"every run is in {args.out / 'accuracy.json'}")


if __name__ == "__main__":
    main()

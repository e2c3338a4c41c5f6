"""Training and inference throughput of this project and its peers, side by side on this machine.

    uv run --group peers benchmarks/speed.py
    uv run --group peers benchmarks/speed.py --batch_sizes=128 --rounds=9 --variants="imgclf_jax host,keras,linen"

All variants train the same network with the same optimizer on the same random images; onnxruntime and OpenVINO only
classify. This project is timed with its whole training loop: the stream of shuffled uint8 batches, their copy to the
device, augmentation, the step and its metrics. Peers are timed with bare loops over float images in memory, without the
start and end of an epoch; see `peers/`.

Every variant runs in its own process, with its framework's default settings. All stay alive, and one that trains at 224
pixels takes up to 6 GB, so name only as many as fit into memory. One that ends early is left out. In each round, for
each batch size and mode, the variants are measured one after the other, in reverse in odd rounds. Ratios compare
measurements of one round, seconds apart, so that drift of the machine cancels; the tables have the median over the
rounds and [min, max]. "The fastest peer" has the greatest median. The fraction of the matmul peak compares the FLOPs of
the matmuls in the training step (networks.py) with a large square matmul that JAX computes in the same round, for each
batch size.

Writes speed.json, with every measurement, and speed.png.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import report
from networks import NETWORKS, Network
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from variants import MEASURED, OWN, PEAK, PEERS
from worker import Worker

_PAUSE = 0.3  # seconds until the threads of the previous variant sleep


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags; exits if they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="cnn", help=f"comma-separated, from {', '.join(NETWORKS)}")
    parser.add_argument("--batch_sizes", default="32,128,512", help="comma-separated")
    parser.add_argument("--modes", default="train,infer", help="comma-separated, from train and infer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="approximate duration of a measurement")
    parser.add_argument("--variants", default="", help="comma-separated prefixes of names; default: all installed")
    parser.add_argument("--images", type=int, default=0, help="in memory; default: 12,800, at 224 px 512")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args(argv)
    args.networks = args.networks.split(",")
    args.modes = args.modes.split(",")
    if wrong := [mode for mode in args.modes if mode not in ("train", "infer")]:
        parser.error(f"unknown mode {wrong[0]!r}; allowed: train, infer")
    args.batch_sizes = [int(size) for size in args.batch_sizes.split(",")]
    if wrong := [name for name in args.networks if name not in NETWORKS]:
        parser.error(f"unknown network {wrong[0]!r}; allowed: {', '.join(NETWORKS)}")
    for name in args.networks:
        if (images := count_images(args, name)) < 10 * max(args.batch_sizes):
            parser.error(f"--images={images} for {name}: must be at least ten batches of {max(args.batch_sizes)}")
    known = [*OWN, *PEERS]
    wanted = tuple(name.strip() for name in args.variants.split(",") if name.strip()) or ("",)
    if wrong := [start for start in wanted if not any(name.startswith(start) for name in known)]:
        parser.error(f"no variant's name begins with {wrong[0]!r}; variants: {', '.join(known)}")
    args.variants = [name for name in known if name.startswith(wanted)]
    return args


def measure(args: argparse.Namespace, network: str, console: Console) -> dict[str, Any]:
    """Measures one network.

    Returns {"images": their number, "workers": versions and devices, "absent": reasons, "records": all measurements}.
    """
    names = [*(name for name in args.variants if supports(name, NETWORKS[network])), PEAK]
    turns = [(size, mode, name) for size in args.batch_sizes for mode in (*MEASURED[PEAK].modes, *args.modes)
             for name in names if mode in MEASURED[name].modes]  # fmt: skip
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    records: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        bar = stack.enter_context(Progress(*columns, console=console, transient=True))
        starting = bar.add_task("", total=len(names))
        for name in names:
            bar.update(starting, description=f"starting {name}")
            workers[name] = Worker(name, network, count_images(args, network))
            stack.callback(workers[name].close)
            bar.advance(starting)
        bar.remove_task(starting)
        task = bar.add_task("", total=args.rounds * len(turns))
        try:
            for round_number in range(args.rounds):
                for size, mode, name in order_turns(turns, round_number):
                    bar.update(task, advance=1, description=f"round {round_number + 1}: {name}, {mode} {size}")
                    if workers[name].error:
                        continue
                    time.sleep(_PAUSE)
                    if record := workers[name].ask(mode, size, args.seconds):
                        key = {"round": round_number, "variant": name, "mode": mode, "batch_size": size}
                        records.append({**key, **record})
        except KeyboardInterrupt:
            console.print("interrupted: reporting what was measured")
        return {
            "images": count_images(args, network),
            "workers": {name: worker.about for name, worker in workers.items() if worker.about},
            "absent": {name: worker.error for name, worker in workers.items() if worker.error},
            "records": [record for record in records if not workers[record["variant"]].error],
        }


def count_images(args: argparse.Namespace, network: str) -> int:
    """The number of images in memory for a network."""
    return args.images or NETWORKS[network].images


def supports(variant: str, network: Network) -> bool:
    """Whether the network has a builder for the variant's framework."""
    return getattr(network, MEASURED[variant].builder) is not None


def order_turns(turns: list[tuple[int, str, str]], round_number: int) -> list[tuple[int, str, str]]:
    """Orders the turns of a round by batch size and mode; odd rounds reverse the variants."""
    groups: dict[tuple[int, str], list[tuple[int, str, str]]] = {}
    for turn in turns:
        groups.setdefault(turn[:2], []).append(turn)
    return [turn for group in groups.values() for turn in (reversed(group) if round_number % 2 else group)]


def main(argv: list[str]) -> int:
    """Measures, prints the tables, and writes both files."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    result: dict[str, Any] = {
        "date": report.now(),
        "arguments": argv,
        "settings": {name: getattr(args, name) for name in ("batch_sizes", "rounds", "seconds")},
        "machine": report.machine(),
        "networks": {},
    }
    for network in args.networks:
        measured = measure(args, network, console)
        measured["summary"] = report.summarize(measured, NETWORKS[network])
        result["networks"][network] = measured
        (args.out / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
        report.print_report(network, measured, result["machine"])
    with_rates = {name: each for name, each in result["networks"].items() if each["summary"]}
    if with_rates:
        report.plot(with_rates, result["machine"], args.out / "speed.png")
        print(f"every measurement is in {args.out / 'speed.json'}, the plot in {args.out / 'speed.png'}")
    return 0 if with_rates else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

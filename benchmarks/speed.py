"""Training and inference throughput of this project and its peers, side by side on this machine.

    uv run --group peers benchmarks/speed.py
    uv run --group peers benchmarks/speed.py --batch_sizes=128 --rounds=9 --peers=keras,linen

The same network, with the same optimizer, on the same random images. This project's numbers hold all that its training
loop does: the stream of shuffled uint8 batches, their copy, augmentation, the step and the sums of its metrics. The
peers' are those of their bare loops over float images that already lie in memory, without what starts and ends an
epoch; see each file in `peers/`.

Every variant runs in a process of its own, with its framework's default settings. In each round, for each batch size
and mode, the variants are measured one after the other, odd rounds in reverse. A ratio is formed within a round, of
measurements that lie seconds apart, so that drift of the machine cancels; the median over the rounds is given, and
[least, greatest]. "The fastest peer" is the one whose median is greatest. The share of the matmul peak is the FLOPs of
the training step's products (networks.py) against a large square product that JAX computes in the same round, at each
batch size anew.

Writes speed.json, with every single measurement, and speed.png.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import report
from machine import machine, now
from networks import NETWORKS, Network
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from variants import MEASURED, OWN, PEAK, PEERS
from workers import Worker

_PAUSE = 0.3  # seconds after which the threads of the variant before have gone to sleep


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags; exits if they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="cnn", help=f"comma-separated, of {', '.join(NETWORKS)}")
    parser.add_argument("--batch_sizes", default="32,128,512", help="comma-separated")
    parser.add_argument("--modes", default="train,infer", help="comma-separated, of train and infer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement, about")
    parser.add_argument("--peers", default=None, help="comma-separated beginnings of names; default: all that run here")
    parser.add_argument("--images", type=int, default=12_800)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args(argv)
    args.networks = args.networks.split(",")
    args.modes = args.modes.split(",")
    if wrong := [mode for mode in args.modes if mode not in ("train", "infer")]:
        parser.error(f"unknown mode {wrong[0]!r}; there are train and infer")
    args.batch_sizes = [int(size) for size in args.batch_sizes.split(",")]
    if wrong := [name for name in args.networks if name not in NETWORKS]:
        parser.error(f"unknown network {wrong[0]!r}; there are {', '.join(NETWORKS)}")
    if args.images < 10 * max(args.batch_sizes):
        parser.error(f"--images={args.images} are fewer than ten batches of {max(args.batch_sizes)}")
    wanted = [""] if args.peers is None else [name.strip() for name in args.peers.split(",") if name.strip()]
    if wrong := [start for start in wanted if not any(name.startswith(start) for name in PEERS)]:
        parser.error(f"no peer's name begins with {wrong[0]!r}; there are: {', '.join(PEERS)}")
    args.peers = [name for name in PEERS if name.startswith(tuple(wanted))] if wanted else []
    return args


def measure(args: argparse.Namespace, network: str, console: Console) -> dict[str, Any]:
    """Measures one network: {"workers": versions and devices, "absent": reasons, "records": all measurements}."""
    names = [*OWN, *(name for name in args.peers if runs(name, NETWORKS[network])), PEAK]
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
            workers[name] = Worker(name, network, args.images)
            stack.callback(workers[name].close)
            bar.advance(starting)
        bar.remove_task(starting)
        task = bar.add_task("", total=args.rounds * len(turns))
        try:
            for round_number in range(args.rounds):
                for size, mode, name in in_order(turns, round_number):
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
            "workers": {name: worker.about for name, worker in workers.items() if worker.about},
            "absent": {name: worker.error for name, worker in workers.items() if worker.error},
            "records": records,
        }


def runs(peer: str, network: Network) -> bool:
    """Whether the network is written for the peer's framework."""
    return getattr(network, MEASURED[peer].module.removeprefix("peers.on_")) is not None


def in_order(turns: list[tuple[int, str, str]], round_number: int) -> list[tuple[int, str, str]]:
    """The turns of a round, by batch size and mode; odd rounds reverse the order of the variants."""
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
        "date": now(),
        "arguments": argv,
        "settings": {name: getattr(args, name) for name in ("batch_sizes", "rounds", "seconds", "images")},
        "machine": machine(),
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

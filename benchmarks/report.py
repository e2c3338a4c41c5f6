"""Turns measurements into ratios, tables and a plot, beside the machine and the time."""

import contextlib
import datetime
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

from networks import Network
from rich.console import Console
from rich.table import Table
from variants import MEASURED, OWN, PEAK, PEERS

_TITLES = {"train": "training", "infer": "inference"}
Rates = dict[int, float]  # round → images per second


def machine() -> dict[str, Any]:
    """The processor, the cores available to this process, the system and the Python version."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "system": platform.system(), "python": platform.python_version()}


def now() -> str:
    """The local time with its time zone, ISO 8601."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def spread(values: list[float]) -> dict[str, float] | None:
    """The median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def ratios(a: Rates, b: Rates) -> list[float]:
    """The ratios a / b within each round that has both."""
    return [a[r] / b[r] for r in a if r in b]


def summarize(measured: dict[str, Any], network: Network) -> list[dict[str, Any]]:
    """One row per mode, batch size and variant: its rate and, for this project, the ratios to the fastest peers."""
    rates: dict[tuple[str, int], dict[str, Rates]] = {}
    peaks: dict[tuple[str, int], Rates] = {}  # FLOP/s
    for record in measured["records"]:
        if record["variant"] == PEAK:
            peaks.setdefault((record["mode"], record["batch_size"]), {})[record["round"]] = record["flops_per_second"]
        else:
            group = rates.setdefault((record["mode"], record["batch_size"]), {})
            group.setdefault(record["variant"], {})[record["round"]] = record["images_per_second"]

    rows = []
    for (mode, batch_size), group in sorted(rates.items(), key=lambda item: (item[0][1], item[0][0] != "train")):
        peers = [name for name in group if name in PEERS]
        in_float32 = [name for name in peers if PEERS[name].precision == "float32"]
        fastest = {"float32": _fastest(in_float32, group), "any": _fastest(peers, group)}
        for name in (name for name in MEASURED if name in group):
            precision = MEASURED[name].precision
            flops = network.training_flops if mode == "train" else network.inference_flops
            row: dict[str, Any] = {
                "mode": mode, "batch_size": batch_size, "variant": name,
                "images_per_second": spread(list(group[name].values())),
                "fastest_peers": fastest,
            }  # fmt: skip
            if name in OWN:
                for kind, peer in fastest.items():
                    row[f"to_fastest_{kind}"] = spread(ratios(group[name], group[peer])) if peer else None
                reached = {r: rate * flops for r, rate in group[name].items()}
                row["share_of_peak"] = spread(ratios(reached, peaks.get((precision, batch_size), {})))
            else:
                same = group.get(f"imgclf_jax host {precision}", {})
                row["own_to_it"] = spread(ratios(same, group[name]))
            rows.append(row)
    return rows


def _fastest(names: list[str], group: dict[str, Rates]) -> str | None:
    return max(names, key=lambda name: statistics.median(group[name].values()), default=None)


def cell(values: dict[str, float] | None, form: str) -> str:
    """Formats `median [min, max]`, or "" without values."""
    if not values:
        return ""
    return f"{values['median']:{form}} [{values['min']:{form}}, {values['max']:{form}}]"


def print_report(network: str, measured: dict[str, Any], machine: dict[str, Any]) -> None:
    """Prints the tables to standard output, with unwrapped lines if it is a file."""
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    console.print(f"{network} on {machine['cpu']}, {machine['cores']} cores; median [least, greatest] over the rounds")
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in measured["summary"]:
        groups.setdefault((row["mode"], row["batch_size"]), []).append(row)
    for (mode, batch_size), rows in groups.items():
        fastest = rows[0]["fastest_peers"]
        named = f"fastest peer in float32: {fastest['float32'] or 'none'}; of all: {fastest['any'] or 'none'}"
        table = Table(title=f"{_TITLES[mode]}, batch {batch_size}", caption=named, title_justify="left")
        table.add_column("variant", no_wrap=True)
        for column in ("images/s", "µs an image", "to fastest float32 peer", "to fastest peer", "of matmul peak",
                       "imgclf_jax host to it"):  # fmt: skip
            table.add_column(column, justify="right")
        for row in rows:
            rate = row["images_per_second"]
            table.add_row(
                row["variant"], cell(rate, ",.0f"), f"{1e6 / rate['median']:.1f}",
                cell(row.get("to_fastest_float32"), ".2f"), cell(row.get("to_fastest_any"), ".2f"),
                cell(row.get("share_of_peak"), ".0%"), cell(row.get("own_to_it"), ".2f"),
                style="bold" if row["variant"] in OWN else None,
            )  # fmt: skip
        console.print(table)
    _print_peak(measured, console)
    console.print(_workers(measured))


def _print_peak(measured: dict[str, Any], console: Console) -> None:
    for precision in MEASURED[PEAK].modes:
        records = [r for r in measured["records"] if r["variant"] == PEAK and r["mode"] == precision]
        if records:
            values = spread([r["flops_per_second"] / 1e9 for r in records])
            console.print(f"matmul peak in {precision}: {cell(values, ',.0f')} GFLOP/s")


def _workers(measured: dict[str, Any]) -> Table:
    """The greatest memory, device and versions of each process, or the reason why it is absent."""
    table = Table(title="processes", title_justify="left")
    table.add_column("variant", no_wrap=True)
    table.add_column("MB at most", justify="right")
    table.add_column("device")
    table.add_column("versions, or why it is absent", overflow="fold")
    for name, reason in measured["absent"].items():
        table.add_row(name, "", "", reason)
    for name, about in measured["workers"].items():
        most = max((r["rss_mb"] for r in measured["records"] if r["variant"] == name), default=about["rss_mb"])
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        table.add_row(name, f"{most:,.0f}", about["device"], versions)
    return table


def plot(networks: dict[str, Any], machine: dict[str, Any], path: Path) -> None:
    """Plots a row per network and batch size and a column per mode: bars at the median, lines from min to max."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    panels: list[tuple[str, int]] = []
    for network, measured in networks.items():
        sizes = sorted({row["batch_size"] for row in measured["summary"]})
        panels += [(network, size) for size in sizes]
    most = max(len({row["variant"] for row in m["summary"]}) for m in networks.values())
    measured_modes = {row["mode"] for m in networks.values() for row in m["summary"]}
    modes = [mode for mode in _TITLES if mode in measured_modes]
    size_in_inches = (6 * len(modes) + (len(modes) == 1), 0.9 + len(panels) * (0.24 * most + 0.7))
    figure, axes = plt.subplots(len(panels), len(modes), figsize=size_in_inches, squeeze=False, layout="constrained")
    own, peer = "#c2410c", "#94a3b8"
    for line, (network, size) in zip(axes, panels, strict=True):
        for axis, mode in zip(line, modes, strict=True):
            rows = [r for r in networks[network]["summary"] if r["mode"] == mode and r["batch_size"] == size]
            rows.sort(key=lambda row: row["images_per_second"]["median"])
            _bars(axis, rows, own, peer)
            axis.set_title(f"{network}, {_TITLES[mode]}, batch {size}", loc="left", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("images/s")
    figure.suptitle(f"{machine['cpu']}, {machine['cores']} cores", x=0.01, ha="left", fontsize=11)
    figure.legend(
        handles=[Patch(color=own, label="imgclf_jax"), Patch(color=peer, label="peers")],
        loc="outside upper right", ncols=2, frameon=False, fontsize=9,
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(axis: Any, rows: list[dict[str, Any]], own: str, peer: str) -> None:
    rates = [row["images_per_second"] for row in rows]
    medians = [rate["median"] for rate in rates]
    errors = [[r["median"] - r["min"] for r in rates], [r["max"] - r["median"] for r in rates]]
    axis.barh(
        range(len(rows)), medians, height=0.72, xerr=errors,
        color=[own if row["variant"] in OWN else peer for row in rows],
        error_kw={"elinewidth": 1.0, "capsize": 2.0, "ecolor": "#1e293b"},
    )  # fmt: skip
    axis.set_yticks(range(len(rows)), [row["variant"] for row in rows], fontsize=8)
    right = max((rate["max"] for rate in rates), default=1.0)
    for place, rate in enumerate(rates):
        axis.text(rate["max"] + 0.015 * right, place, f"{rate['median']:,.0f}", va="center", fontsize=8)
    axis.set_xlim(0, 1.15 * right)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.01)

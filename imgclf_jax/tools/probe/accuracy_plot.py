"""A plot of probe accuracies against the number of images per class. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imgclf_jax.core import paths
from imgclf_jax.core.typing import JsonMapping

_K = 20  # the plot shows the k nearest to this; the best k would be selected on the test set


def draw(path: Path, records: Sequence[JsonMapping], title: str) -> None:
    """Draws the records of the command `probe` as a PNG, with a panel for each set.

    Few-shot accuracies are points with standard deviations; probes on the full training set are lines.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    sets = list(dict.fromkeys(record["set"] for record in records))
    figure = Figure(figsize=(5.5 * len(sets), 4), layout="constrained", dpi=150)
    figure.suptitle(title, fontsize=10)
    for panel, name in zip(np.atleast_1d(figure.subplots(1, len(sets))), sets, strict=True):
        own = [record for record in records if record["set"] == name]
        few = [record for record in own if record["method"] == "few images"]
        if few:
            shots, means = [r["shots"] for r in few], [r["mean"] for r in few]
            spread = [r["deviation"] or 0 for r in few]
            panel.errorbar(shots, means, spread, marker="o", capsize=3, color="C0", label="linear probe on few images")
        neighbors = [r for r in own if r["method"] == "nearest neighbors"]
        shown = min(neighbors, key=lambda r: abs(r["k"] - _K))
        lines = [(f"nearest neighbors, k = {shown['k']}", "C1", "--", shown)]
        lines += [("linear probe", "C2", "-.", r) for r in own if r["method"] == "linear probe"]
        lines += [("the network's own head", "C3", ":", r) for r in own if r["method"] == "own head"]
        for label, colour, style, record in lines:
            panel.axhline(record["mean"], color=colour, linestyle=style, label=f"{label}, all images")
        panel.set_xscale("log")
        panel.set_xticks([r["shots"] for r in few], [str(r["shots"]) for r in few])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set(title=name, xlabel="images per class", ylabel="accuracy")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower right")
    with paths.replacing(path) as file:
        figure.savefig(file, format="png")

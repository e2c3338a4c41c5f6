"""The learning curves of a report, from the records of a run."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from imgclf_jax.run.record import Record
from imgclf_jax.tools.pages import html
from imgclf_jax.tools.pages.charts import COLORS, Line, chart, thinned
from imgclf_jax.tools.pages.html import paragraph

# What is logged in training besides its metrics: what it is called, and by how much it is multiplied.
_OTHERS = {
    "learning_rate": ("learning rate", 1),
    "grad_norm": ("gradient norm", 1),
    "param_norm": ("parameter norm", 1),
    "images_per_second": ("training images a second", 1),
    "input_wait": ("waiting for input, % of the time", 100),
}


def curves(run: Record) -> str:
    """A chart of each metric, with a line for training and one for each evaluation set, and of what else is logged."""
    if not run.metrics:
        return paragraph("There are none: metrics.jsonl is missing, or holds no record yet.")
    sets = list(run.config.data.eval)[: COLORS - 1]
    kinds = dict.fromkeys(("loss", "accuracy"))
    for record in run.metrics:
        for name in record:
            where, _, kind = name.partition("/")
            own = where in sets or (where == "train" and kind not in _OTHERS)
            if own and kind != "examples" and not kind.endswith("_std"):
                kinds[kind.removeprefix("ensemble_")] = None
    figures, drawn = [], dict[tuple[str, int, bool], None]()
    for kind in kinds:
        lines = [_line(run.metrics, name, f"{name}/{kind}", color) for color, name in enumerate(("train", *sets))]
        lines += [_line(run.metrics, f"{name}, ensemble", f"{name}/ensemble_{kind}", color, dashed=True)
                  for color, name in enumerate(sets, 1)]  # fmt: skip
        figures.append(_figure(kind, lines))
        drawn.update({(one.name, one.color, one.dashed): None for one in lines if one.points})
    for name, (called, times) in _OTHERS.items():
        figures.append(_figure(called, [_line(run.metrics, "train", f"train/{name}", 0, times=times)]))
    lost = [called for name, (called, _) in _OTHERS.items() if not any(f"train/{name}" in r for r in run.metrics)]
    several = run.config.num_seeds > 1
    notes = [f"Lines are means over {run.config.num_seeds} seeds. The bands are one standard deviation to each side, "
             "where it is logged."] if several else []  # fmt: skip
    notes += [f"Not logged: {', '.join(lost)}."] if lost else []
    return (html.legend(list(drawn)) + (paragraph(" ".join(notes), note=True) if notes else "")
            + html.charts([one for one in figures if one]))  # fmt: skip


def _figure(caption: str, lines: Sequence[Line]) -> str:
    lines = [one for one in lines if one.points]
    said = "; ".join(f"{one.name} ends at {one.points[-1][1]:.4g}" for one in lines)
    return html.figure(caption, chart(caption, said, "step", lines) if lines else "")


def _line(
    records: Sequence[Mapping[str, Any]], called: str, name: str, color: int, dashed: bool = False, times: float = 1
) -> Line:
    """A metric at the steps that have it, with one standard deviation to each side if that is logged."""
    values = {r["step"]: r for r in records if isinstance(r.get(name), int | float)}
    steps = thinned(sorted(values))
    points = [(step, times * float(values[step][name])) for step in steps]
    band = [(step, mean - std, mean + std) for step, mean in points
            if math.isfinite(std := float(values[step].get(f"{name}_std", math.nan)))]  # fmt: skip
    return dataclasses.replace(Line(called, color, points, dashed=dashed), band=band)

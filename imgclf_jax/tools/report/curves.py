"""The learning curves of a report."""

import dataclasses
import math
from collections.abc import Sequence

from imgclf_jax.core.typing import JsonMapping
from imgclf_jax.run.record import Record
from imgclf_jax.tools.pages import html
from imgclf_jax.tools.pages.charts import COLORS, Line, chart, thinned
from imgclf_jax.tools.pages.html import paragraph

# Training logs besides metrics: their captions and scale factors.
_OTHERS = {
    "learning_rate": ("learning rate", 1),
    "grad_norm": ("gradient norm", 1),
    "param_norm": ("parameter norm", 1),
    "images_per_second": ("training images per second", 1),
    "input_wait": ("waiting for input, % of the time", 100),
}


def curves(run: Record) -> str:
    """Draws a chart of each metric, with a line for training and each evaluation set, and of the other logs."""
    if not run.metrics:
        return paragraph("There are no curves: metrics.jsonl is missing, or has no record yet.")
    sets = list(run.config.data.eval)[: COLORS - 1]
    kinds = dict.fromkeys(("loss", "accuracy"))
    for record in run.metrics:
        for name in record:
            group, _, kind = name.partition("/")
            is_metric = group in sets or (group == "train" and kind not in _OTHERS)
            if is_metric and kind != "examples" and not kind.endswith("_std"):
                kinds[kind.removeprefix("ensemble_")] = None
    pairs = [(r.get(f"{name}/nll"), r.get(f"{name}/loss")) for r in run.metrics for name in ("train", *sets)]
    if all(nll == loss for nll, loss in pairs if nll is not None):
        kinds.pop("nll", None)  # one curve
    figures, drawn = [], dict[tuple[str, int, bool], None]()
    for kind in kinds:
        lines = [_line(run.metrics, name, f"{name}/{kind}", color) for color, name in enumerate(("train", *sets))]
        lines += [_line(run.metrics, f"{name}, ensemble", f"{name}/ensemble_{kind}", color, dashed=True)
                  for color, name in enumerate(sets, 1)]  # fmt: skip
        figures.append((kind, chart(kind, "step", lines)))
        drawn.update({(line.name, line.color, line.dashed): None for line in lines if line.points})
    for name, (caption, scale) in _OTHERS.items():
        line = _line(run.metrics, "train", f"train/{name}", 0, scale=scale)
        figures.append((caption, chart(caption, "step", [line])))
    notes = [f"Lines are means over {run.config.num_seeds} seeds. Bands are one standard deviation to each side, if "
             "logged."] if run.config.num_seeds > 1 else []  # fmt: skip
    if run.train_examples:
        notes.append(f"An epoch is {run.train_examples / run.config.batch_size:.6g} steps.")
    return (html.legend(list(drawn)) + (paragraph(" ".join(notes), note=True) if notes else "")
            + html.charts(figures))  # fmt: skip


def _line(
    records: Sequence[JsonMapping], label: str, name: str, color: int, dashed: bool = False, scale: float = 1
) -> Line:
    """Returns a metric's line, with a band of one standard deviation to each side if that is logged."""
    values = {r["step"]: r for r in records if isinstance(r.get(name), int | float)}
    steps = thinned(sorted(values))
    points = [(step, scale * float(values[step][name])) for step in steps]
    band = [(step, mean - std, mean + std) for step, mean in points
            if math.isfinite(std := float(values[step].get(f"{name}_std", math.nan)))]  # fmt: skip
    return dataclasses.replace(Line(label, color, points, dashed=dashed), band=band)

"""The section of a report about an evaluation set."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from imgclf_jax.core.terminal import format_metrics
from imgclf_jax.core.text import decimals
from imgclf_jax.data.resizing import to_uint8
from imgclf_jax.scores.multilabel import TargetPredictions
from imgclf_jax.tools.evaluate import by_class, intervals
from imgclf_jax.tools.explain import explanations, heatmap
from imgclf_jax.tools.pages import html, pictures
from imgclf_jax.tools.pages.charts import Line, chart, thinned
from imgclf_jax.tools.pages.html import paragraph, region, table, text
from imgclf_jax.tools.report.findings import Section, TopLoss

_FULL = 30  # classes up to which the page shows the full confusion matrix
_NARROW = 12  # classes up to which the table and the matrix fit side by side
_ROWS = 100  # most classes in a table
_LONG = 3  # longer class names are rotated above a column


def set_section(one: Section, names: Sequence[str], num_seeds: int) -> str:
    """Returns the section about an evaluation set. With several seeds it says which parts describe the ensemble."""
    parts = [_metrics(one.name, one.evaluated.metrics, num_seeds)]
    if one.evaluated.multilabel:
        return "".join((*parts, _scores(one), _labels(one.name, one.evaluated.multilabel, names)))
    if not one.evaluated.scores:
        note = f"This page has the metrics alone, because the probabilities of {len(names):,} classes may not fit into "
        return "".join((*parts, paragraph(note + "memory.", note=True)))
    tables = [_classes(one, names)]
    if len(names) <= _FULL:
        matrix = _matrix(f"Confusion matrix on {one.name}", one.evaluated.counts["confusion"], names)
        tables.append("<h3>Confusion matrix</h3>" + matrix)
    parts += [_side_by_side(_scores(one), _calibration(one) + _selective_risk(one)),
              *([_side_by_side(*tables)] if len(names) <= _NARROW else tables)]  # fmt: skip
    return "".join((*parts, _top_losses(one, names, num_seeds)))


def _metrics(name: str, metrics: Mapping[str, float], num_seeds: int) -> str:
    """Formats metrics in a line; for several seeds, a table of means, standard deviations and the ensemble's."""
    examples = f"{metrics['examples']} examples"
    if num_seeds == 1:
        values = {key: value for key, value in metrics.items() if key != "examples"}
        return paragraph(f"{examples}: " + format_metrics(values).replace("  ", ", "))
    kinds = [key for key in metrics if f"{key}_std" in metrics]  # those of a method's `evaluate` have no ensemble's
    rows = [[kind, *(decimals(metrics[key]) if key in metrics else ""
                     for key in (kind, f"{kind}_std", f"ensemble_{kind}"))] for kind in kinds]  # fmt: skip
    note = (f"Means and sample standard deviations over {num_seeds} seeds, and the ensemble, which averages their "
            f"probabilities. Everything below describes the ensemble. The set has {examples}.")  # fmt: skip
    columns = ["metric", "mean", "standard deviation", "ensemble"]
    return paragraph(note) + table(f"Metrics on {name}", columns, rows)


def _side_by_side(*blocks: str) -> str:
    """Puts blocks side by side if there is room."""
    blocks = tuple(f"<div>{block}</div>" for block in blocks if block)
    return f'<div class="side">{"".join(blocks)}</div>' if blocks else ""


def _scores(one: Section) -> str:
    note = "The 95 % confidence interval is for test sets of this size. Another training seed may differ by more."
    return ("<h3>Scores</h3>" + table(f"Scores on {one.name}", *intervals.table(one.evaluated.scores))
            + paragraph(note, note=True))  # fmt: skip


def _calibration(one: Section) -> str:
    if one.reliability is None or not one.reliability.examples.sum():
        return ""
    bins = len(one.reliability.examples)
    rows = [[f"{i / bins:.3f} to {(i + 1) / bins:.3f}", str(int(n)), *(decimals(v) if n else "" for v in means)]
            for i, (n, *means) in enumerate(zip(*one.reliability, strict=True))]  # fmt: skip
    columns = ["confidence", "examples", "mean confidence", "accuracy"]
    points = [(mean, own) for n, mean, own in zip(*one.reliability, strict=True) if n]
    title = f"Reliability on {one.name}: accuracy by mean confidence"
    svg = chart(title, "confidence", [Line("diagonal", 8, [(0, 0), (1, 1)], dashed=True), Line("accuracy", 0, points)],
                "The values are in the table below.", linear=True)  # fmt: skip
    note = f"Accuracy in {bins} bins of confidence. The model is overconfident where the line is below the diagonal."
    return (f"<h3>Calibration</h3><figure>{svg}</figure>" + paragraph(note, note=True)
            + html.details("The bins as a table", table(f"Calibration on {one.name}", columns, rows)))  # fmt: skip


def _selective_risk(one: Section) -> str:
    if one.risk is None:
        return ""
    points = thinned([((k + 1) / len(one.risk), float(risk)) for k, risk in enumerate(one.risk)])
    svg = chart(f"Selective risk on {one.name}: error by coverage", "coverage", [Line("error", 0, points)], linear=True)
    note = ("The error among the most confident fraction of the examples, its coverage. The mean over all fractions "
            f"(AURC) is {decimals(float(one.risk.mean()))}.")  # fmt: skip
    return f"<h3>Selective risk</h3><figure>{svg}</figure>" + paragraph(note, note=True)


def _labels(name: str, predictions: TargetPredictions, names: Sequence[str]) -> str:
    """Returns the scores of each class of a multi-label set."""
    columns, rows = by_class.multilabel_table(predictions, names)
    caption = f"Average precision and decisions of each class on {name}"
    if len(rows) > _ROWS:
        precisions = predictions.average_precision(np.ones((1, len(predictions.targets))))[0]
        shown = np.argsort(precisions, kind="stable")[:_ROWS]  # NaN, of a class without examples, is last
        rows, caption = [rows[i] for i in shown], f"{caption}: the {_ROWS} of {len(names):,} with the lowest"
    return "<h3>Classes</h3>" + table(caption, columns, rows) + paragraph(by_class.THRESHOLD_NOTE, note=True)


def _classes(one: Section, names: Sequence[str]) -> str:
    columns, rows = by_class.table(names, one.evaluated.counts)
    caption = f"Recall and precision of each class on {one.name}"
    if len(rows) > _ROWS:
        examples, right = (one.evaluated.counts[key] for key in ("examples", "correct"))
        recall = np.where(examples > 0, right / np.maximum(examples, 1), np.inf)
        rows = [rows[i] for i in np.argsort(recall, kind="stable")[:_ROWS]]
        caption += f": the {_ROWS} of {len(names):,} with the lowest recall"
    return "<h3>Classes</h3>" + table(caption, columns, rows)


def _matrix(caption: str, confusion: np.ndarray, names: Sequence[str]) -> str:
    """Returns a confusion matrix, shaded by the fraction of the label's examples."""
    long = ' class="long"' if any(len(name) > _LONG for name in names) else ""
    head = "".join(f'<th scope="col"><span{long}>{text(name)}</span></th>' for name in names)
    top = f'<th class="axis-name" scope="colgroup" colspan="{len(names)}">predicted class</th>'
    side = f'<th class="axis-name" scope="rowgroup" rowspan="{len(names)}"><span>true class</span></th>'
    lines = []
    for i, name in enumerate(names):
        total, cells = confusion[i].sum(), []
        for j, count in enumerate(confusion[i].tolist()):
            if count:
                share = 0.2 + 0.8 * math.sqrt(count / total)  # makes one mistake in a hundred visible
                kind = "right" if i == j else "wrong"
                cells.append(f'<td class="{kind}" style="--share: {share:.2f}">{count}</td>')
            else:
                cells.append('<td class="zero">0</td>')
        lines.append(f'<tr>{"" if i else side}<th scope="row"><span>{text(name)}</span></th>{"".join(cells)}</tr>')
    shown = (f'<table class="confusion"><caption>{text(caption)}</caption>'
             f'<thead><tr><td colspan="2"></td>{top}</tr><tr><td colspan="2"></td>{head}</tr></thead>'
             f"<tbody>{''.join(lines)}</tbody></table>")  # fmt: skip
    return region(caption, shown)


def _top_losses(one: Section, names: Sequence[str], num_seeds: int) -> str:
    if not one.top_losses:
        return ""
    correct = sum(example.label == example.predicted for example in one.top_losses)
    examples, right = (one.evaluated.counts[key].sum() for key in ("examples", "correct"))
    note = f"{examples - right} of {examples} examples are misclassified. " if right < examples else "None is wrong. "
    note += "These have the highest loss, the negative log-likelihood of their class"
    note += f"; {correct} of them are classified correctly. " if correct else ". "
    note += f"They are as the model sees them. The heatmap on the right shows {_METHODS[one.method]}. "
    if num_seeds > 1:
        note += ("It uses the ensemble's probability. " if one.method == "occlusion" else
                 f"It is the mean over {num_seeds} seeds. ")  # fmt: skip
    note += "Each heatmap has its own scale:"
    scale = '<p class="note scale">least <span aria-hidden="true"></span> most</p>'
    items = "".join(f"<li>{_top_loss(example, names, one.method)}</li>" for example in one.top_losses)
    return ("<h3>Highest losses</h3>" + paragraph(note, note=True) + scale
            + f'<ul class="pictures pairs">{items}</ul>')  # fmt: skip


_METHODS = {
    "gradcam": "the evidence for the predicted class (Grad-CAM)",
    "occlusion": "how much the probability of the predicted class drops when a square covers the region (occlusion)",
}
_COLORS = 64  # in the image of a heatmap


def _top_loss(example: TopLoss, names: Sequence[str], method: str) -> str:
    label, predicted = names[example.label], names[example.predicted]
    right = example.label == example.predicted
    verdict = "classified correctly" if right else f"taken for {predicted}"
    picture = pictures.tag(example.image, f"{example.example}: of class {label}, {verdict}")
    signed = method == "occlusion"
    overlay = heatmap.overlay(to_uint8(example.image), heatmap.scale(example.heat, signed))
    peak = heatmap.peak(example.heat, signed)
    method_text = f"{explanations.TITLES[method].partition(':')[0]} for {predicted}"
    alt = f"{example.example}, {method_text}: " + (f"most at {peak}" if peak else "nothing stands out")
    other = "correct" if right else f"taken for <strong>{text(predicted)}</strong> ({decimals(example.probability)})"
    return (
        f'<figure><div class="pair">{picture}{pictures.tag(overlay, alt, _COLORS)}</div>'
        f"<figcaption><strong>{text(label)}</strong> ({decimals(example.label_probability)}), {other}, "
        f"loss {example.loss:.3g}<br>{text(example.example)}"
        f"<br>Right: {text(method_text)}{'' if peak else ', where nothing stands out'}</figcaption></figure>"
    )

"""The parts of a report on one evaluation set, and on augmentation."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from imgclf_jax.run.terminal import format_metrics
from imgclf_jax.scores import multilabel
from imgclf_jax.scores.multilabel import MultilabelScores
from imgclf_jax.scores.regression import RegressionScores
from imgclf_jax.tools.evaluate import by_class
from imgclf_jax.tools.explain import heatmap
from imgclf_jax.tools.pages import html, pictures, residuals
from imgclf_jax.tools.pages.html import paragraph, region, table, text
from imgclf_jax.tools.pages.reliability import diagram
from imgclf_jax.tools.report.augmentation import Augmented
from imgclf_jax.tools.report.findings import Evaluated
from imgclf_jax.tools.report.mistakes import Mistake

_FULL = 30  # classes whose confusion matrix is shown whole
_NARROW = 12  # classes whose table and matrix have room side by side
_PAIRS = 30  # confusions in a list
_ROWS = 100  # classes in a table
_TARGETS = 12  # whose errors are drawn
_LONG = 3  # letters of a class's name that stand upright above a column


def of_set(one: Evaluated, names: Sequence[str], num_seeds: int) -> str:
    """All that was found on an evaluation set. With several seeds it says what is of the ensemble."""
    parts = [_metrics(one.name, one.metrics, num_seeds)]
    if isinstance(one.of_targets, MultilabelScores):
        return "".join((*parts, _scores(one), _labels(one.name, one.of_targets, names)))
    if isinstance(one.of_targets, RegressionScores):
        return "".join((*parts, _scores(one), _errors(one.name, one.of_targets, names)))
    if not one.scores:
        parts.append(paragraph(f"Scores, calibration and mistakes are left out: there are {len(names):,} classes, and "
                               "the probabilities of so many may not fit into memory.", note=True))  # fmt: skip
    tables = _classes(one, names), _confusion(one, names)
    parts += [_side(_scores(one), _calibration(one)), *([_side(*tables)] if len(names) <= _NARROW else tables)]
    return "".join((*parts, _mistakes(one, names, num_seeds)))


def _metrics(name: str, metrics: Mapping[str, float], num_seeds: int) -> str:
    """In a line; of several seeds a table of means, deviations and the ensemble's, with what these are."""
    examples = f"{metrics['examples']} examples"
    if num_seeds == 1:
        values = {key: value for key, value in metrics.items() if key != "examples"}
        return paragraph(f"{examples}: " + format_metrics(values).replace("  ", ", "))
    kinds = [key.removeprefix("ensemble_") for key in metrics if key.startswith("ensemble_")]
    rows = [[kind, *(f"{metrics[key]:.4f}" for key in (kind, f"{kind}_std", f"ensemble_{kind}"))] for kind in kinds]
    said = (f"Means over {num_seeds} seeds with their sample standard deviation, and the ensemble, whose probabilities "
            f"are the mean of the seeds'. All below is the ensemble's. There are {examples}.")  # fmt: skip
    return paragraph(said) + table(f"Metrics on {name}", ["metric", "mean", "deviation", "ensemble"], rows)


def _side(*blocks: str) -> str:
    """Blocks side by side where there is room."""
    blocks = tuple(f"<div>{block}</div>" for block in blocks if block)
    return f'<div class="side">{"".join(blocks)}</div>' if blocks else ""


def _scores(one: Evaluated) -> str:
    if not one.scores:
        return ""
    rows = [[name, f"{of['value']:.4f}", f"{of['low']:.4f} to {of['high']:.4f}" if "low" in of else ""]
            for name, of in one.scores.items()]  # fmt: skip
    note = ("The interval is the 95 % confidence interval for test sets of this size. Another seed of training may "
            "differ by more.")  # fmt: skip
    return ("<h3>Scores</h3>" + table(f"Scores on {one.name}", ["score", "value", "95 % interval"], rows)
            + paragraph(note, note=True))  # fmt: skip


def _calibration(one: Evaluated) -> str:
    if one.reliability is None or not one.reliability.examples.sum():
        return ""
    found, bins = one.reliability, len(one.reliability.examples)
    rows = [[f"{i / bins:.3f} to {(i + 1) / bins:.3f}", str(int(n)), *(f"{v:.4f}" if n else "" for v in means)]
            for i, (n, *means) in enumerate(zip(*found, strict=True))]  # fmt: skip
    columns = ["confidence", "examples", "mean confidence", "accuracy"]
    svg = diagram(f"Reliability on {one.name}", *(values.tolist() for values in found))
    note = (f"Bars are the accuracy in {bins} bins of confidence, dots their mean confidence. Where dots lie below the "
            "dashed line, the model is surer than it is right.")  # fmt: skip
    return (f"<h3>Calibration</h3><figure>{svg}</figure>" + paragraph(note, note=True)
            + html.details("The bins as a table", table(f"Calibration on {one.name}", columns, rows)))  # fmt: skip


def _labels(name: str, scores: MultilabelScores, names: Sequence[str]) -> str:
    """Of several labels: how well each class is found, and how reliable its probabilities are."""
    columns, rows = multilabel.table(scores, names)
    shown = sorted(range(len(rows)), key=lambda i: float(rows[i][2] or "inf"))[:_ROWS] if len(rows) > _ROWS else None
    caption = f"Average precision and decisions of each class on {name}"
    if shown:
        rows, caption = [rows[i] for i in shown], f"{caption}: the {_ROWS} of {len(names):,} with the lowest"
    columns_of_bins = ["class", "probability", "examples", "mean probability", "share that has the class"]
    bins = [
        [names[c], f"{i / 10:.1f} to {(i + 1) / 10:.1f}", str(int(n)), f"{mean:.4f}", f"{share:.4f}"]
        for c in (shown or range(len(names)))
        for i, (n, mean, share) in enumerate(zip(*scores.reliability(c), strict=True))
        if n
    ]
    said = "Where the mean probability is above the share of examples that have the class, the model is too sure of it."
    calibration = "<h3>Calibration</h3>" + paragraph(said, note=True)
    calibration += html.details("The bins of each class", table(f"Reliability on {name}", columns_of_bins, bins))
    return (
        "<h3>Classes</h3>"
        + table(caption, columns, rows)
        + paragraph(multilabel.THRESHOLD_NOTE, note=True)
        + calibration
    )


def _errors(name: str, scores: RegressionScores, names: Sequence[str]) -> str:
    """Of numbers: the residuals of each target by its true value, and their histogram."""
    parts = ["<h3>Errors</h3>"]
    for i, target in enumerate(names[:_TARGETS]):
        truth, errors = scores.targets[:, i].astype(np.float64), scores.errors[:, i]
        figures = (residuals.plot(f"Residuals of {target} on {name}", truth, errors),
                   residuals.histogram(f"Errors of {target} on {name}", errors))  # fmt: skip
        parts.append(
            html.charts(
                [
                    html.figure(caption, svg)
                    for caption, svg in zip(
                        (f"{target}: predicted less true, by the true value", f"{target}: errors"), figures, strict=True
                    )
                    if svg
                ]
            )
        )
    if len(names) > _TARGETS:
        parts.append(paragraph(f"The first {_TARGETS} of {len(names)} targets are drawn.", note=True))
    return "".join(parts)


def _classes(one: Evaluated, names: Sequence[str]) -> str:
    columns, rows = by_class.table(names, one.counts)
    caption = f"Recall and precision of each class on {one.name}"
    if len(rows) > _ROWS:
        examples, right = (one.counts[f"class_{key}"] for key in ("examples", "correct"))
        recall = np.where(examples > 0, right / np.maximum(examples, 1), np.inf)
        rows = [rows[i] for i in np.argsort(recall, kind="stable")[:_ROWS]]
        caption += f": the {_ROWS} of {len(names):,} with the lowest recall"
    return "<h3>Classes</h3>" + table(caption, columns, rows)


def _confusion(one: Evaluated, names: Sequence[str]) -> str:
    confusion = one.counts.get("confusion")
    if confusion is None:
        return ""
    if len(names) <= _FULL:
        return "<h3>Confusion matrix</h3>" + _matrix(f"Confusion matrix on {one.name}", confusion, names)
    pairs = by_class.most_confused(confusion, _PAIRS)
    if not pairs:
        return ""
    rows = [[names[label], names[predicted], str(count), f"{count / confusion[label].sum():.4f}"]
            for label, predicted, count in pairs]  # fmt: skip
    columns = ["class", "taken for", "examples", "share of the class"]
    return "<h3>Most frequent confusions</h3>" + table(f"The classes most often confused on {one.name}", columns, rows)


def _matrix(caption: str, confusion: np.ndarray, names: Sequence[str]) -> str:
    """A row a label, a column a prediction. The shade is by the share of the label's examples."""
    long = ' class="long"' if any(len(name) > _LONG for name in names) else ""
    head = "".join(f'<th scope="col"><span{long}>{text(name)}</span></th>' for name in names)
    lines = []
    for i, name in enumerate(names):
        total, cells = confusion[i].sum(), []
        for j, count in enumerate(confusion[i].tolist()):
            if count:
                share = 0.2 + 0.8 * math.sqrt(count / total)  # so that one mistake of a hundred is seen
                kind = "right" if i == j else "wrong"
                cells.append(f'<td class="{kind}" style="--share: {share:.2f}">{count}</td>')
            else:
                cells.append('<td class="zero">0</td>')
        lines.append(f'<tr><th scope="row"><span>{text(name)}</span></th>{"".join(cells)}</tr>')
    shown = (f'<table class="confusion"><caption>{text(caption)}</caption>'
             f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>")  # fmt: skip
    return paragraph("A row is a class, a column what its examples are taken for.", note=True) + region(caption, shown)


def _mistakes(one: Evaluated, names: Sequence[str], num_seeds: int) -> str:
    if not one.scores:
        return ""
    if not one.mistakes:
        return "<h3>Mistakes</h3>" + paragraph("There are none.")
    count = f"The {len(one.mistakes)} most confident of {one.wrong}" if one.wrong > len(one.mistakes) else (
        f"All {one.wrong}, the most confident first" if one.wrong > 1 else "The only one")  # fmt: skip
    said = f"{count}, as the model is given them. In brackets is the probability of a class. "
    said += f"On the right is the same picture in grey, and over it {_METHODS[one.method]}. "
    if num_seeds > 1:
        of = "the ensemble's probability" if one.method == "occlusion" else f"the mean of the maps of {num_seeds} seeds"
        said += f"It is {of}. "
    said += "Each picture has a scale of its own:"
    scale = '<p class="note scale">least <span aria-hidden="true"></span> most</p>'
    items = "".join(f"<li>{_mistake(mistake, names, one.method)}</li>" for mistake in one.mistakes)
    return ("<h3>The most confident mistakes</h3>" + paragraph(said, note=True) + scale
            + f'<ul class="pictures pairs">{items}</ul>')  # fmt: skip


_METHODS = {
    "gradcam": "what speaks for the class that it is taken for (Grad-CAM)",
    "rollout": "what the network looks at, which is the same for every class (attention rollout)",
    "occlusion": "how far the probability of the class that it is taken for falls when a square covers the place "
                 "(occlusion)",
}  # fmt: skip
_SHORT = {"gradcam": "Grad-CAM", "rollout": "attention rollout", "occlusion": "occlusion"}
_COLORS = 64  # of a heat map's picture


def _mistake(mistake: Mistake, names: Sequence[str], method: str) -> str:
    label, predicted = names[mistake.label], names[mistake.predicted]
    picture = pictures.tag(mistake.image, f"{mistake.example}: of class {label}, taken for {predicted}")
    signed = method == "occlusion"
    laid = heatmap.over(pictures.levels(mistake.image), heatmap.scaled(mistake.heat, signed))
    place = heatmap.place(mistake.heat, signed)
    how = _SHORT[method] + ("" if method == "rollout" else f" for {predicted}")
    alt = f"{mistake.example}, {how}: " + (f"most at {place}" if place else "nothing stands out")
    return (f'<figure><div class="pair">{picture}{pictures.tag(laid, alt, _COLORS)}</div>'
            f"<figcaption><strong>{text(label)}</strong> ({mistake.of_label:.3f}), taken for "
            f"<strong>{text(predicted)}</strong> ({mistake.probability:.3f})<br>{text(mistake.example)}"
            f"<br>Right: {text(how)}{'' if place else ', where nothing stands out'}</figcaption></figure>")  # fmt: skip


def of_augmentation(found: Augmented, ops: str, mix: str) -> str:
    """A row for each of some training images: as it is, and several draws."""
    said = f"Training images as they are, and as the run's own keys draw them: {ops}."
    if found.whole_batch:
        said += " The first draw is what the run, or its first seed, trains on at step 0; the others have the keys of "
        said += "later steps."
    else:
        said += " They are drawn in a smaller batch than the run's, so that they fit into memory: the draws may differ."
    if found.stretched:
        said += " They are stretched from their least to their greatest value, since an op gives any range."
    if mix:
        said += f" In training {mix} then mixes pairs of images, which is not shown."
    caption = "What augmentation does"
    columns = ["example", "as it is", *(f"step {step}" for step in found.steps)]
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    lines = []
    for name, image, draws in zip(found.names, found.images, found.draws, strict=True):
        cells = [pictures.tag(image, f"{name} as it is")]
        cells += [pictures.tag(own, f"{name} at step {step}") for own, step in zip(draws, found.steps, strict=True)]
        lines.append(
            f'<tr><th scope="row">{text(Path(name).name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        )
    shown = (f'<table class="draws"><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
             f"<tbody>{''.join(lines)}</tbody></table>")  # fmt: skip
    return paragraph(said) + region(caption, shown)

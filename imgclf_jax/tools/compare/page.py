"""The page of `compare`: its tables and the learning curves, in one HTML file without scripts."""

import math
from collections.abc import Sequence

from imgclf_jax.tools.compare import tables as compare_tables
from imgclf_jax.tools.compare.comparison import Group, common, shown
from imgclf_jax.tools.compare.paired_runs import Comparison
from imgclf_jax.tools.pages import html
from imgclf_jax.tools.pages.charts import COLORS, Line, chart, thinned
from imgclf_jax.tools.pages.html import table, text


def page(groups: Sequence[Group], comparisons: Sequence[Comparison], metric: str, damaged: Sequence[str]) -> str:
    """The whole page. Everything on it that comes from the runs is escaped."""
    done = sum(len(one.done) for one in groups)
    left = sum(len(one.unfinished) for one in groups)
    keys = len(groups[0].settings)
    title = "Runs compared by " + (", ".join(groups[0].settings) or "their seed")
    body = [f"<h1>{text(title)}</h1>", _summary(groups, metric, done, left)]
    columns, rows = compare_tables.results(groups)
    if rows:
        body.append("<h2>Results</h2>" + table("The best first", columns, rows, keys, best=len(rows) > 1))
    columns, rows = compare_tables.tests(comparisons)
    if rows:
        body.append("<h2>Beside the best, in pairs</h2>"
                    + table(f"Each against {groups[0].label}", columns, rows, keys))  # fmt: skip
    body += [f'<p class="note">{text(line)}</p>' for line in compare_tables.notes(groups, comparisons)]
    body.append(_curves(groups))
    columns, rows = compare_tables.unfinished(groups)
    if rows:
        body.append("<h2>Not done yet</h2>" + table("They count in no table above", columns, rows, 1))
    if damaged:
        body.append("<h2>Left out</h2><ul>" + "".join(f"<li>{text(line)}</li>" for line in damaged) + "</ul>")
    same = "".join(f"<dt>{text(key)}</dt><dd>{text(shown(value))}</dd>" for key, value in common(groups).items())
    body.append(f"<h2>What is the same</h2><details><summary>The keys of all runs</summary><dl>{same}</dl></details>")
    return html.document(title, body)


def _summary(groups: Sequence[Group], metric: str, done: int, left: int) -> str:
    best = groups[0].metrics().get(metric)
    said = f"{done} run{'s' * (done != 1)} done"
    said += f", {left} not done yet." if left else "."
    if best and len(groups) > 1:
        said += f" The best {metric} has {groups[0].label}: {compare_tables.spread_text(best)}."
    return f"<p>{text(said)}</p>"


def _curves(groups: Sequence[Group]) -> str:
    """A chart for each metric, with a line for each of the first groups."""
    drawn = groups[:COLORS]
    sets = dict.fromkeys(name for one in drawn for run in (*one.done, *one.unfinished) for name in run.config.data.eval)
    names = [
        *(f"{name}/{kind}" for name in sets for kind in ("accuracy", "mean_average_precision", "r2", "nll", "loss")),
        "train/loss",
    ]
    figures = []
    for name in names:
        lines = [line for i, one in enumerate(drawn) if (line := _line(one, name, i))]
        said = "; ".join(f"{line.name} ends at {line.points[-1][1]:.4g}" for line in lines)
        if svg := chart(name, said, "step", lines):
            figures.append(html.figure(name, svg))
    if not figures:
        return ""
    legend = html.legend([(one.label, i, False) for i, one in enumerate(drawn)])
    more = f" The first {COLORS} of {len(groups)} are drawn." if len(groups) > COLORS else ""
    note = f"Lines are means over the runs, bands go from the least run to the greatest.{more}"
    if any(one.unfinished and not one.done for one in drawn):
        note += " Dotted lines are of runs that are not done."
    return f'<h2>Learning curves</h2>{legend}<p class="note">{text(note)}</p>{html.charts(figures)}'


def _line(group: Group, name: str, color: int) -> Line | None:
    """The mean of a metric at the steps of which all runs of a group that are done have it; else of the others."""
    runs = group.done or group.unfinished
    each = [{record["step"]: float(record[name]) for record in run.metrics if isinstance(record.get(name), int | float)}
            for run in runs]  # fmt: skip
    steps = thinned(sorted(set.intersection(*map(set, each)))) if each else []
    if not steps:
        return None
    values = {step: [one[step] for one in each] for step in steps}
    points = [(step, sum(some) / len(some)) for step, some in values.items()]
    band = [(step, min(some), max(some)) for step, some in values.items() if all(map(math.isfinite, some))]
    return Line(group.label, color, points, band if len(runs) > 1 else (), dashed=not group.done)

"""The page of `compare`: tables and learning curves in one HTML file without scripts."""

import math
from collections.abc import Sequence

from imgclf_jax.run.ranking import MAIN_METRICS
from imgclf_jax.tools.compare import tables as compare_tables
from imgclf_jax.tools.compare.comparison import Comparison, Group, best, common, shown
from imgclf_jax.tools.pages import html
from imgclf_jax.tools.pages.charts import COLORS, Line, chart, thinned
from imgclf_jax.tools.pages.html import paragraph, table, text


def page(
    groups: Sequence[Group], comparisons: Sequence[Comparison], metric: str, damaged: Sequence[str], tested: bool
) -> str:
    """Returns the page as HTML. All text from the runs is escaped. `tested` is that of `tables.notes`."""
    keys = len(groups[0].settings)
    title = "Runs compared by " + (", ".join(groups[0].settings) or "their seed")
    done = sum(len(group.done) for group in groups)
    summary = f"{done} run{'s' * (done != 1)} finished."
    if len(groups) > 1 and (first := best(groups, metric)):
        summary += f" {first.label} has the best {metric}: {compare_tables.spread_text(first.metrics()[metric])}."
    body = [f"<h1>{text(title)}</h1>", paragraph(summary)]
    columns, rows = compare_tables.results(groups)
    if rows:
        ranked = best(groups, metric) is not None
        caption = "The best first" if ranked else "Not ranked, because the runs have no main metric"
        body.append("<h2>Results</h2>" + table(caption, columns, rows, keys, best=ranked and len(rows) > 1))
    columns, rows = compare_tables.tests(comparisons)
    if rows:
        body.append("<h2>Paired comparison with the best</h2>"
                    + table(f"Each against {groups[0].label}", columns, rows, keys))  # fmt: skip
    body += [paragraph(line, note=True) for line in compare_tables.notes(groups, comparisons, tested)]
    body.append(_curves(groups))
    if damaged:
        body.append("<h2>Skipped</h2><ul>" + "".join(f"<li>{text(line)}</li>" for line in damaged) + "</ul>")
    same = "".join(f"<dt>{text(key)}</dt><dd>{text(shown(value))}</dd>" for key, value in common(groups).items())
    body.append("<h2>Shared config</h2>" + html.details("Keys that all runs share", f"<dl>{same}</dl>"))
    return html.document(title, body)


def _curves(groups: Sequence[Group]) -> str:
    """Draws a chart for each metric, with a line for each of the first groups."""
    drawn = groups[:COLORS]
    sets = dict.fromkeys(
        name for group in drawn for run in (*group.done, *group.unfinished) for name in run.config.data.eval
    )
    names = [*(f"{name}/{kind}" for name in sets for kind in (*MAIN_METRICS, "nll", "loss")), "train/loss"]
    figures = [(name, chart(name, "step", [_line(group, name, i) for i, group in enumerate(drawn)])) for name in names]
    if not any(svg for _, svg in figures):
        return ""
    legend = html.legend([(group.label, i, False) for i, group in enumerate(drawn)])
    more = f" The charts show the first {COLORS} of {len(groups)} groups." if len(groups) > COLORS else ""
    note = f"Lines are means over the runs; bands span the lowest to the highest run.{more}"
    if any(group.unfinished and not group.done for group in drawn):
        note += " Dotted lines are unfinished runs."
    return "<h2>Learning curves</h2>" + legend + paragraph(note, note=True) + html.charts(figures)


def _line(group: Group, name: str, color: int) -> Line:
    """Averages a metric over the finished (else the unfinished) runs of a group, at the steps that all of them have."""
    runs = group.done or group.unfinished
    each = [{record["step"]: float(record[name]) for record in run.metrics if isinstance(record.get(name), int | float)}
            for run in runs]  # fmt: skip
    steps = thinned(sorted(set.intersection(*map(set, each)))) if each else []
    values = {step: [series[step] for series in each] for step in steps}
    points = [(step, sum(own) / len(own)) for step, own in values.items()]
    band = [(step, min(own), max(own)) for step, own in values.items() if all(map(math.isfinite, own))]
    return Line(group.label, color, points, band if len(runs) > 1 else (), dashed=not group.done)

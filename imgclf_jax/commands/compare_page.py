"""The page of `compare`: its tables and the learning curves, in one HTML file without scripts."""

import math
from collections.abc import Sequence
from html import escape

from imgclf_jax.commands import compare_tables
from imgclf_jax.commands.charts import COLORS, Line, chart
from imgclf_jax.commands.comparison import Group, common, shown
from imgclf_jax.commands.paired_runs import Comparison
from imgclf_jax.core.text import printable

_POINTS = 300  # of a line, at most

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1b1b; --faint: #5b5b5b; --rule: #d9d9d9; --best: #eef5ee;
  --c0: #0067a8; --c1: #c04a00; --c2: #00785a; --c3: #a8357f; --c4: #7d6200; --c5: #5a3fb8; --c6: #a3132f;
  --c7: #006f7f; --c8: #4f4f4f; --c9: #5f7d00; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15171a; --text: #e8e8e8; --faint: #a9a9a9; --rule: #3a3d42; --best: #1d2b20;
    --c0: #62b5f0; --c1: #ff9a5c; --c2: #45d1a8; --c3: #f08cc8; --c4: #e0c14a; --c5: #b5a1ff; --c6: #ff7f92;
    --c7: #5ccfdf; --c8: #c4c4c4; --c9: #b4d455; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { max-width: 45rem; } .note, figcaption { color: var(--faint); font-size: .9rem; }
.wide { overflow-x: auto; } .wide:focus-visible { outline: 2px solid var(--c0); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; color: var(--faint); padding-bottom: .3rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--rule); white-space: nowrap;
  font-weight: normal; }
tbody th { white-space: normal; min-width: 8.5rem; max-width: 20rem; overflow-wrap: anywhere; }
thead th { font-weight: 600; border-bottom: 2px solid var(--rule); }
tr.best { background: var(--best); }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--faint); }
.grid { stroke: var(--rule); } .axis { stroke: var(--faint); } .line { fill: none; stroke-width: 2; }
.band { opacity: .15; stroke: none; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .92rem; }
.legend svg { display: inline-block; width: 1.6rem; height: .7rem; margin-right: .4rem; }
details dt { font-weight: 600; } details dd { margin: 0 0 .3rem 1rem; overflow-wrap: anywhere; }
"""
_STYLE += "".join(
    f".line.c{i} {{ stroke: var(--c{i});{' stroke-dasharray: 10 3 2 3;' if i > 4 else ''} }} "
    f".band.c{i}, .dot.c{i} {{ fill: var(--c{i}); }}\n"
    for i in range(COLORS)
)  # colors alone do not tell ten lines apart
_STYLE += ".line.dashed { stroke-dasharray: 3 3; }\n"


def page(groups: Sequence[Group], comparisons: Sequence[Comparison], metric: str, damaged: Sequence[str]) -> str:
    """The whole page. Everything on it that comes from the runs is escaped."""
    done = sum(len(one.done) for one in groups)
    left = sum(len(one.unfinished) for one in groups)
    keys = len(groups[0].settings)
    title = "Runs compared by " + (", ".join(groups[0].settings) or "their seed")
    body = [f"<h1>{_text(title)}</h1>", _summary(groups, metric, done, left)]
    columns, rows = compare_tables.results(groups)
    if rows:
        body.append("<h2>Results</h2>" + _table("The best first", columns, rows, keys, best=len(rows) > 1))
    columns, rows = compare_tables.tests(comparisons)
    if rows:
        body.append("<h2>Beside the best, in pairs</h2>"
                    + _table(f"Each against {groups[0].label}", columns, rows, keys))  # fmt: skip
    body += [f'<p class="note">{_text(line)}</p>' for line in compare_tables.notes(groups, comparisons)]
    body.append(_curves(groups))
    columns, rows = compare_tables.unfinished(groups)
    if rows:
        body.append("<h2>Not done yet</h2>" + _table("They count in no table above", columns, rows, 1))
    if damaged:
        body.append("<h2>Left out</h2><ul>" + "".join(f"<li>{_text(line)}</li>" for line in damaged) + "</ul>")
    same = "".join(f"<dt>{_text(key)}</dt><dd>{_text(shown(value))}</dd>" for key, value in common(groups).items())
    body.append(f"<h2>What is the same</h2><details><summary>The keys of all runs</summary><dl>{same}</dl></details>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _summary(groups: Sequence[Group], metric: str, done: int, left: int) -> str:
    best = groups[0].metrics().get(metric)
    said = f"{done} run{'s' * (done != 1)} done"
    said += f", {left} not done yet." if left else "."
    if best and len(groups) > 1:
        said += f" The best {metric} has {groups[0].label}: {compare_tables.spread_text(best)}."
    return f"<p>{_text(said)}</p>"


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], keys: int, best: bool = False) -> str:
    """A table, of which the first `keys` columns name the row."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in columns)
    lines = []
    for number, row in enumerate(rows):
        cells = [f'<th scope="row">{_text(cell)}</th>' if i < keys else f"<td>{_text(cell)}</td>"
                 for i, cell in enumerate(row)]  # fmt: skip
        lines.append(f"<tr{' class="best"' if best and not number else ''}>{''.join(cells)}</tr>")
    return (f'<div class="wide" role="region" tabindex="0" aria-label="{_text(caption)}"><table>'
            f"<caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
            "</table></div>")  # fmt: skip


def _curves(groups: Sequence[Group]) -> str:
    """A chart for each metric, with a line for each of the first groups."""
    drawn = groups[:COLORS]
    sets = dict.fromkeys(name for one in drawn for run in (*one.done, *one.unfinished) for name in run.config.data.eval)
    names = [*(f"{name}/{kind}" for name in sets for kind in ("accuracy", "loss")), "train/loss"]
    figures = []
    for name in names:
        lines = [line for i, one in enumerate(drawn) if (line := _line(one, name, i))]
        said = "; ".join(f"{line.name} ends at {line.points[-1][1]:.4g}" for line in lines)
        if svg := chart(name, said, "step", lines):
            figures.append(f"<figure><figcaption>{_text(name)}</figcaption>{svg}</figure>")
    if not figures:
        return ""
    swatch = '<svg viewBox="0 0 32 14" aria-hidden="true"><path class="line c{}" d="M0 7H32"/></svg>'
    legend = "".join(f"<li>{swatch.format(i)}{_text(one.label)}</li>" for i, one in enumerate(drawn))
    more = f" The first {COLORS} of {len(groups)} are drawn." if len(groups) > COLORS else ""
    note = f"Lines are means over the runs, bands go from the least run to the greatest.{more}"
    if any(one.unfinished and not one.done for one in drawn):
        note += " Dotted lines are of runs that are not done."
    return (f'<h2>Learning curves</h2><ul class="legend">{legend}</ul><p class="note">{_text(note)}</p>'
            f'<div class="charts">{"".join(figures)}</div>')  # fmt: skip


def _line(group: Group, name: str, color: int) -> Line | None:
    """The mean of a metric at the steps of which all runs of a group that are done have it; else of the others."""
    runs = group.done or group.unfinished
    each = [{record["step"]: float(record[name]) for record in run.metrics if isinstance(record.get(name), int | float)}
            for run in runs]  # fmt: skip
    steps = sorted(set.intersection(*map(set, each))) if each else []
    if not steps:
        return None
    if len(steps) > _POINTS:
        steps = [steps[round(i * (len(steps) - 1) / (_POINTS - 1))] for i in range(_POINTS)]
    values = {step: [one[step] for one in each] for step in steps}
    points = [(step, sum(some) / len(some)) for step, some in values.items()]
    band = [(step, min(some), max(some)) for step, some in values.items() if all(map(math.isfinite, some))]
    return Line(group.label, color, points, band if len(runs) > 1 else (), dashed=not group.done)


def _text(text: str) -> str:
    return escape(printable(text))

"""The command `compare`: results of runs by the keys that differ, with paired tests and learning curves."""

import csv
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from imgclf_jax.core import terminal
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.run import record
from imgclf_jax.tools.compare import comparison, predictions
from imgclf_jax.tools.compare import page as compare_page
from imgclf_jax.tools.compare import tables as compare_tables
from imgclf_jax.tools.compare.comparison import Comparison, Group
from imgclf_jax.tools.pages.html import write

log = logging.getLogger(__name__)


def main(files: Sequence[str], format: str, html: str, test: bool, trust: bool) -> int:
    """Compares the runs in and below the directories `files`; returns 1 if some of them are damaged, else 0.

    - `format` is "table", "csv" or "json".
    - `html` is a file for a page, or "".
    - `test` evaluates each finished run without saved predictions, and saves them in its directory.

    Raises UserError if there is no run, and if the page is not writable.
    """
    runs, damaged = record.find(files)
    groups, (metric, _) = comparison.group_runs(runs), comparison.main_metric(runs)
    for sentence in comparison.differing_origins(groups):
        log.warning("%s", sentence)
    comparisons = comparison.compare(groups, predictions.load_all(runs, test, trust))
    if format == "json":
        terminal.print_json(_as_json(groups, comparisons, metric, damaged))
    elif format == "csv":
        _print_csv(groups)
    else:
        for columns, rows in (compare_tables.results(groups), compare_tables.tests(comparisons)):
            if rows:
                terminal.print_table([column.replace("/", " ") for column in columns], rows)  # where a terminal breaks
        for line in compare_tables.notes(groups, comparisons, test):
            terminal.print_text(line)
    if html:
        write(Path(html), compare_page.page(groups, comparisons, metric, damaged, test))
        log.info("wrote %s", html)
    return 1 if damaged else 0


def _print_csv(groups: Sequence[Group]) -> None:
    """Prints a row per group: its keys, seeds and unfinished runs, and each metric's mean and standard deviation."""
    rows = []
    for group in groups:
        settings = {key: comparison.shown(v) if isinstance(v, dict) else v for key, v in group.settings.items()}
        row = {**settings, "seeds": " ".join(map(str, group.seeds)), "unfinished": len(group.unfinished)}
        for name, value in group.metrics().items():
            row |= {name: value.mean, f"{name}_std": "" if math.isnan(value.std) else value.std}
        rows.append(row)
    writer = csv.DictWriter(sys.stdout, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _as_json(
    groups: Sequence[Group], comparisons: Sequence[Comparison], metric: str, damaged: Sequence[str]
) -> JsonObject:
    return {
        "common": comparison.common(groups),
        "groups": [
            {"settings": dict(group.settings), "seeds": group.seeds, "runs": [run.name for run in group.done],
             "metrics": {name: value._asdict() for name, value in group.metrics().items()},
             "unfinished": [{"run": run.name, "step": run.step, "total": run.total, "metrics": run.latest()}
                            for run in group.unfinished]}
            for group in groups
        ],
        "best": dict(ranked.settings) if (ranked := comparison.best(groups, metric)) else None,
        "comparisons": [
            {"settings": dict(c.group.settings), "set": c.set, "examples": c.examples,
             "difference": c.difference._asdict(), "mcnemar_mid_p": c.p, "holm": c.adjusted}
            for c in comparisons
        ],
        "damaged": list(damaged),
    }  # fmt: skip

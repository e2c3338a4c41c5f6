"""The command `compare`: results of runs beside the keys that differ, with tests in pairs and learning curves."""

import csv
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable
from imgclf_jax.run import record, terminal
from imgclf_jax.tools.compare import known_predictions
from imgclf_jax.tools.compare import page as compare_page
from imgclf_jax.tools.compare import tables as compare_tables
from imgclf_jax.tools.compare.comparison import Group, common, group, main_metric, shown
from imgclf_jax.tools.compare.paired_runs import Comparison, compare
from imgclf_jax.tools.pages.html import write

log = logging.getLogger(__name__)


def main(files: Sequence[str], format: str, html: str, test: bool, trust: bool) -> int:
    """Compares the runs in and below the directories `files`; 1 if some of them are damaged, else 0.

    With `test` each run that is done is evaluated, unless its predictions are known, and they are kept in its
    directory. `html` names a file for a page. Raises UserError if there is no run, and for a page that cannot be
    written.
    """
    runs, damaged = record.find(files)
    for text in damaged:
        log.error("left out: %s", text)
    if not runs:
        raise UserError(f"{', '.join(files)}: no run is in or below; a run's directory has a config.json")
    groups = group(runs)
    known = known_predictions.load_all(runs, test, trust)
    comparisons = compare(groups, known)
    if processes.index():
        return 1 if damaged else 0
    if format == "json":
        print(json.dumps(_as_json(groups, comparisons, damaged), indent=2))
    elif format == "csv":
        _print_csv(groups)
    else:
        _print_tables(groups, comparisons)
    if html:
        write(Path(html), compare_page.page(groups, comparisons, main_metric(groups), damaged))
        log.info("written: %s", html)
    return 1 if damaged else 0


def _print_tables(groups: Sequence[Group], comparisons: Sequence[Comparison]) -> None:
    for columns, rows in (compare_tables.results(groups), compare_tables.tests(comparisons)):
        if rows:
            terminal.print_table(columns, rows)
    for line in compare_tables.notes(groups, comparisons):
        print(printable(line))
    columns, rows = compare_tables.unfinished(groups)
    if rows:
        terminal.print_table(columns, rows)


def _print_csv(groups: Sequence[Group]) -> None:
    """A row a group: its keys, its seeds, its unfinished runs, and of each metric mean and standard deviation."""
    metrics = list(dict.fromkeys(name for one in groups for name in one.metrics()))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    keys = list(groups[0].settings)
    writer.writerow([*keys, "seeds", "unfinished", *(f"{name}{end}" for name in metrics for end in ("", "_std"))])
    for one in groups:
        values, cells = one.metrics(), list[Any]()
        for name in metrics:
            found = values.get(name)
            cells += ["", ""] if found is None else [found.mean, "" if math.isnan(found.std) else found.std]
        seeds = " ".join(map(str, one.seeds))
        row = [shown(value) if isinstance(value, dict) else value for value in one.settings.values()]
        writer.writerow([*row, seeds, len(one.unfinished), *cells])


def _as_json(groups: Sequence[Group], comparisons: Sequence[Comparison], damaged: Sequence[str]) -> dict[str, Any]:
    return {
        "common": common(groups),
        "groups": [
            {"settings": dict(one.settings), "seeds": one.seeds, "runs": [run.name for run in one.done],
             "metrics": {name: _finite(value._asdict()) for name, value in one.metrics().items()},
             "unfinished": [{"run": run.name, "step": run.step, "total": run.total, "metrics": _finite(run.latest())}
                            for run in one.unfinished]}
            for one in groups
        ],
        "best": dict(groups[0].settings),
        "comparisons": [
            {"settings": dict(one.group.settings), "set": one.set, "score": one.score, "examples": one.examples,
             "difference": _finite(one.difference._asdict()), "holm": one.adjusted,
             "mcnemar_mid_p" if one.score in ("accuracy", "exact_match") else "bootstrap_p": one.p}
            for one in comparisons
        ],
        "damaged": list(damaged),
    }  # fmt: skip


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """What is not finite is null: JSON has no such numbers."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}

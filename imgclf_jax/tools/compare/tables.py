"""The tables of `compare`, as columns and rows of text, and what is to be known of them."""

import math
from collections.abc import Mapping, Sequence

from imgclf_jax.run.record import MAIN_METRICS, Record
from imgclf_jax.run.terminal import format_metrics
from imgclf_jax.tools.compare.comparison import Group, shown
from imgclf_jax.tools.compare.paired import Spread
from imgclf_jax.tools.compare.paired_runs import Comparison

_SELDOM = ("top5", "ensemble_")  # metrics that the table leaves out; CSV and JSON have all


def spread_text(value: Spread) -> str:
    """`0.9444 ± 0.0055`; of one value without a deviation."""
    return f"{value.mean:.4f}" + ("" if math.isnan(value.std) else f" ± {value.std:.4f}")


def numbers(values: Sequence[int]) -> str:
    """Ascending numbers in short: `0, 1, 2`, and from four in a row on `0 to 9, 20`."""
    rows: list[list[int]] = []
    for value in values:
        if rows and value == rows[-1][-1] + 1:
            rows[-1].append(value)
        else:
            rows.append([value])
    return ", ".join(f"{row[0]} to {row[-1]}" if len(row) > 3 else ", ".join(map(str, row)) for row in rows)


def _columns(groups: Sequence[Group]) -> list[str]:
    """The metrics of the table: those that any group has."""
    names = dict.fromkeys(name for one in groups for name in one.metrics())
    return [name for name in names if not name.rpartition("/")[2].startswith(_SELDOM)]


def results(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """The columns and the rows of the results: a row for each group with a run that is done."""
    keys, metrics = list(groups[0].settings), _columns(groups)
    rows = []
    for one in groups:
        if one.done:
            values = one.metrics()
            cells = [spread_text(values[name]) if name in values else "" for name in metrics]
            rows.append([*map(shown, one.settings.values()), numbers(one.seeds), *cells])
    return [*keys, "seed", *metrics], rows


def tests(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """The columns and the rows of the comparisons with the best group."""
    of_targets = any(one.score != "accuracy" for one in comparisons)
    columns = ["set", *["score"] * of_targets, "difference", "95 % interval", "p" if of_targets else "McNemar mid-p",
               "by Holm"]  # fmt: skip
    rows = [
        [*map(shown, one.group.settings.values()), one.set, *[one.score] * of_targets, f"{one.difference.value:+.4f}",
         f"{one.difference.low:+.4f} to {one.difference.high:+.4f}", _range(one.p), _range(one.adjusted)]
        for one in comparisons
    ]  # fmt: skip
    return [*(comparisons[0].group.settings if comparisons else []), *columns], rows


def _range(values: Mapping[int, float]) -> str:
    """The least and the greatest p of the seeds."""
    ends = list(dict.fromkeys(_p(value) for value in (min(values.values()), max(values.values())))) if values else []
    return " to ".join(ends)


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def unfinished(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """The columns and the rows of the runs that are not done."""
    rows = [[run.name, f"{run.step} of {run.total}" if run.total else str(run.step), format_metrics(_latest(run))]
            for one in groups for run in one.unfinished]  # fmt: skip
    return ["unfinished run", "step", "its latest metrics"], rows


def _latest(run: Record) -> dict[str, float]:
    wanted = ("train/loss", "train/accuracy", *(f"{name}/{kind}" for name in run.config.data.eval
                                                for kind in (*MAIN_METRICS, "loss", "nll")))  # fmt: skip
    return {name: value for name, value in run.latest().items() if name in wanted}


def notes(groups: Sequence[Group], comparisons: Sequence[Comparison]) -> list[str]:
    """What a reader of the tables has to know, in sentences."""
    notes = []
    if groups[0].done and not _columns(groups):
        notes.append("No run has a metric of evaluation: a method that trains no head gives none, unless it says so.")
    if any(len(one.seeds) > 1 for one in groups):
        notes.append("± is the sample standard deviation over the seeds.")
    if comparisons:
        number, counted = sum(len(one.p) for one in comparisons), {one.score for one in comparisons}
        mcnemar = counted & {"accuracy", "exact_match"}
        score = "accuracy" if counted == {"accuracy"} else "score"
        tests = ["McNemar's test"] * bool(mcnemar) + ["The paired bootstrap"] * bool(counted - mcnemar)
        if "exact_match" in counted:
            tests[0] += " of the share of examples with all labels right (exact match)"
        test = " and ".join(tests).replace("and T", "and t") + " compare" + "s" * (len(tests) == 1)
        sizes = ", ".join(f"{n} of {name}" for name, n in dict.fromkeys((c.set, c.examples) for c in comparisons))
        notes.append(
            f"The difference is that of the mean {score} to the best, {groups[0].label}, on the same examples "
            f"({sizes}). Its interval is Student's, for other examples and, where there are several, other seeds. "
            f"{test} runs of the same seed; of several the least and the greatest p are shown. By "
            f"Holm, p is adjusted for the {number} tests that are made. That the best was chosen by these very "
            "examples is not accounted for."
        )
    elif len([one for one in groups if one.done]) > 1:
        notes.append("There are no paired tests: what the runs predict of each example is not known; add --test.")
    return notes

"""The tables of `compare` as columns and rows of text, and the notes that explain them."""

import math
from collections.abc import Mapping, Sequence

from imgclf_jax.core.text import decimals
from imgclf_jax.tools.compare.comparison import Comparison, Group
from imgclf_jax.tools.compare.paired import Spread

_HIDDEN = ("top5", "ensemble_")  # metrics that only CSV and JSON show


def spread_text(value: Spread) -> str:
    """Formats `0.9444 ± 0.0055`, or `0.9444` for a single value."""
    return decimals(value.mean) + ("" if math.isnan(value.std) else f" ± {decimals(value.std)}")


def _columns(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The metrics of the table, each with a cell for every group. A `loss` that shows what `nll` does has none."""
    values = [group.metrics() for group in groups]
    names = dict.fromkeys(name for own in values for name in own if not name.rpartition("/")[2].startswith(_HIDDEN))
    cells = {name: [spread_text(own[name]) if name in own else "" for own in values] for name in names}
    return {name: texts for name, texts in cells.items()
            if not name.endswith("/loss") or texts != cells.get(f"{name.removesuffix('loss')}nll")}  # fmt: skip


def results(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and rows of the results: a row for each group with a finished run."""
    metrics = _columns(groups)
    rows = [[*group.texts, ", ".join(map(str, group.seeds)), *(texts[i] for texts in metrics.values())]
            for i, group in enumerate(groups) if group.done]  # fmt: skip
    return [*groups[0].settings, "seed", *metrics], rows


def tests(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and rows of the comparisons with the best group."""
    rows = [
        [*c.group.texts, c.set, f"{c.difference.value:+.4f}", f"{c.difference.low:+.4f} to {c.difference.high:+.4f}",
         _range(c.p), _range(c.adjusted)]
        for c in comparisons
    ]  # fmt: skip
    keys = comparisons[0].group.settings if comparisons else []
    return [*keys, "set", "difference", "95 % interval", "McNemar mid-p", "by Holm"], rows


def _range(values: Mapping[int, float]) -> str:
    """Formats the smallest and the largest p of the seeds."""
    ends = (min(values.values()), max(values.values())) if values else ()
    return " to ".join(dict.fromkeys(map(decimals, ends)))


def notes(groups: Sequence[Group], comparisons: Sequence[Comparison], tested: bool) -> list[str]:
    """Explains the tables, a sentence or paragraph each. `tested` says whether missing predictions were made."""
    notes = []
    if left := sum(len(group.unfinished) for group in groups):
        notes.append(f"{left} run{'s are' if left > 1 else ' is'} unfinished and left out: `status` shows how far.")
    if groups[0].done and not _columns(groups):
        notes.append("No run has evaluation metrics: a method that trains no head has none unless it defines them.")
    if any(len(group.seeds) > 1 for group in groups):
        notes.append("± is the sample standard deviation over the seeds.")
    if comparisons:
        number = sum(len(c.p) for c in comparisons)
        sizes = ", ".join(f"{n} of {name}" for name, n in dict.fromkeys((c.set, c.examples) for c in comparisons))
        notes.append(
            f"The difference is a group's share of correct examples (with all labels, if there are several) minus that "
            f"of the best, {groups[0].label}, on the same examples ({sizes}). Student's interval covers other examples "
            "and, with several seeds, other seeds. McNemar's test compares runs of the same seed; the table shows the "
            "smallest and the largest p over the seeds. Holm's method adjusts p for "
            f"{number} test{'s' * (number != 1)}. No adjustment is made for choosing the best group on these same "
            "examples."
        )
    elif len([group for group in groups if group.done]) > 1:
        more = "" if tested else "; add --test to make those that are missing"
        notes.append("There are no paired tests, because no group has predictions that can be paired with those of the "
                     f"best{more}.")  # fmt: skip
    return notes

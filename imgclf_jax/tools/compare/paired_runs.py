"""Paired tests and intervals of each group of runs against the best group, on the same examples."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from imgclf_jax.tools.compare import paired
from imgclf_jax.tools.compare.comparison import Group
from imgclf_jax.tools.compare.saved_predictions import Saved

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A group against the best one, on one evaluation set."""

    group: Group
    set: str
    score: str  # "accuracy" or, for multi-label runs, "exact_match" (McNemar's test); others by the paired bootstrap
    examples: int
    difference: paired.Difference  # of the mean scores, this group's minus the best one's
    p: dict[int, float]  # by seed that both have: McNemar's mid-p, or the bootstrap's p
    adjusted: dict[int, float]  # `p`, Holm-adjusted over all tests


def compare(groups: Sequence[Group], saved: Mapping[str, Mapping[str, Saved]]) -> list[Comparison]:
    """Compares each group with the best on each evaluation set for which all their runs have saved predictions."""
    comparisons: list[Comparison] = []
    sets = groups[0].done[0].config.data.eval if groups[0].done else ()
    first = [(name, joined) for name in sets if (joined := _join_seeds(groups[0], name, saved))]
    for name, (best, best_seeds) in first:
        for group in groups[1:]:
            if not (joined := _join_seeds(group, name, saved)):
                continue
            own, seeds = joined
            if not own.pairs_with(best):
                log.warning("%s: cannot pair %s with the best, because their examples differ", name, group.label)
                continue
            n, both = len(own.examples), [(seed, seeds.index(seed), best_seeds.index(seed))
                                          for seed in seeds if seed in best_seeds]  # fmt: skip
            if len(own.correct):
                score = "accuracy" if own.targets is None else "exact_match"
                pairs = {seed: (own.correct[i], best.correct[j]) for seed, i, j in both}
                p = {seed: paired.mcnemar(int((a & ~b).sum()), int((b & ~a).sum())) for seed, (a, b) in pairs.items()}
                difference = paired.difference(own.correct, best.correct)
                comparisons.append(Comparison(group, name, score, n, difference, p, {}))
            for score in (score for score in own.scores if score in best.scores):
                a, b = own.scores[score], best.scores[score]
                p = {seed: paired.bootstrap_p(a[i], b[j]) for seed, i, j in both}
                difference = paired.bootstrap_difference(a, b, n)
                comparisons.append(Comparison(group, name, score, n, difference, p, {}))
    adjusted = iter(paired.holm([p for comparison in comparisons for p in comparison.p.values()]))
    return [dataclasses.replace(c, adjusted={seed: next(adjusted) for seed in c.p}) for c in comparisons]


def _join_seeds(group: Group, name: str, saved: Mapping[str, Mapping[str, Saved]]) -> tuple[Saved, list[int]] | None:
    """Joins the predictions of a group's seeds on a set, and lists the seeds; None unless every run has them."""
    own = [saved[run.name][name] for run in group.done if name in saved[run.name]]
    if not own or len(own) < len(group.done) or not all(one.pairs_with(own[0]) for one in own):
        return None
    seeds = [seed for run in group.done for seed in run.seeds]
    outputs = [one.outputs for one in own if one.outputs is not None]
    joined = np.concatenate(outputs) if len(outputs) == len(own) else None
    return dataclasses.replace(own[0], correct=np.concatenate([one.correct for one in own]), outputs=joined), seeds

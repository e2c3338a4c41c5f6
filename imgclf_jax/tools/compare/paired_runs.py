"""Groups of runs beside the best one: tests and intervals from what both predict of the same examples."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from imgclf_jax.tools.compare import paired
from imgclf_jax.tools.compare.comparison import Group
from imgclf_jax.tools.compare.known_predictions import Known

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A group beside the best one, on one evaluation set."""

    group: Group
    set: str
    score: str  # "accuracy", or "exact_match" of several labels: tested by McNemar; others by the paired bootstrap
    examples: int
    difference: paired.Difference  # of the mean scores: this group's less the best one's
    p: dict[int, float]  # of McNemar's test with mid-p or of the bootstrap, for each seed that both have
    adjusted: dict[int, float]  # the same by Holm, over all tests that are made


def compare(groups: Sequence[Group], known: Mapping[str, Mapping[str, Known]]) -> list[Comparison]:
    """Each group beside the best one, on each evaluation set of which all their runs' predictions are known."""
    found: list[Comparison] = []
    first = [(name, rows) for name in _sets(groups) if (rows := _right(groups[0], name, known))]
    for name, (best, best_seeds) in first:
        for one in groups[1:]:
            if not (rows := _right(one, name, known)):
                continue
            own, seeds = rows
            if not own.pairs_with(best):
                log.warning("%s: the predictions of %s are of other examples than those of the best", name, one.label)
                continue
            n, both = len(own.examples), [(seed, seeds.index(seed), best_seeds.index(seed))
                                          for seed in seeds if seed in best_seeds]  # fmt: skip
            if len(own.right):
                score = "accuracy" if own.targets is None else "exact_match"
                gains = {seed: (own.right[i], best.right[j]) for seed, i, j in both}
                p = {seed: paired.mcnemar(int((a & ~b).sum()), int((b & ~a).sum())) for seed, (a, b) in gains.items()}
                found.append(Comparison(one, name, score, n, paired.difference(own.right, best.right), p, {}))
            for score in (score for score in own.scores if score in best.scores):
                a, b = own.scores[score], best.scores[score]
                p = {seed: paired.bootstrapped_p(a[i], b[j]) for seed, i, j in both}
                found.append(Comparison(one, name, score, n, paired.bootstrapped_difference(a, b, n), p, {}))
    adjusted = iter(paired.holm([value for one in found for value in one.p.values()]))
    return [dataclasses.replace(one, adjusted={seed: next(adjusted) for seed in one.p}) for one in found]


def _sets(groups: Sequence[Group]) -> list[str]:
    return list(groups[0].done[0].config.data.eval) if groups[0].done else []


def _right(one: Group, name: str, known: Mapping[str, Mapping[str, Known]]) -> tuple[Known, list[int]] | None:
    """What the seeds of a group have right, and which seeds these are; None if that of a run is not known."""
    found = [(run, known[run.name].get(name)) for run in one.done]
    whole = [own for _, own in found if own is not None]
    if not whole or len(whole) < len(found) or not all(own.pairs_with(whole[0]) for own in whole):
        return None
    seeds = [seed for run, _ in found for seed in run.seeds]
    outputs = [own.outputs for own in whole if own.outputs is not None]
    joined = np.concatenate(outputs) if len(outputs) == len(whole) else None
    return dataclasses.replace(whole[0], right=np.concatenate([own.right for own in whole]), outputs=joined), seeds

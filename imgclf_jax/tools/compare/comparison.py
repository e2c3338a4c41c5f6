"""Groups of runs that differ only in their seed, the keys that distinguish them, and their paired comparison."""

import collections
import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core.typing import Value
from imgclf_jax.run import ranking
from imgclf_jax.run.provenance import find_differences
from imgclf_jax.run.record import Record
from imgclf_jax.tools.compare import paired
from imgclf_jax.tools.compare.paired import Spread, spread
from imgclf_jax.tools.compare.predictions import Correct

log = logging.getLogger(__name__)

DIRECTORY = "directory"  # distinguishes groups with equal configs
_IGNORED = ("seed", "num_seeds", *configs.LOCATION_KEYS)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs with the same config, except for their seeds."""

    settings: Mapping[str, Value]  # the keys that differ between groups; None if no parameter depends on the key
    done: Sequence[Record]
    unfinished: Sequence[Record]

    @property
    def label(self) -> str:
        """The settings as text."""
        pairs = zip(self.settings, self.texts, strict=True)
        return ", ".join(f"{key}={text}" for key, text in pairs if text) or "all runs"

    @property
    def texts(self) -> list[str]:
        """The values of the settings as text; those that distinguish no groups of this config are empty."""
        return ["" if value is None or (key == DIRECTORY and not value) else shown(value)
                for key, value in self.settings.items()]  # fmt: skip

    @property
    def seeds(self) -> list[int]:
        """The seeds of the finished runs."""
        return sorted(seed for run in self.done for seed in run.seeds)

    def metrics(self) -> dict[str, Spread]:
        """Returns the metrics that all finished runs have, such as `test/accuracy`, over the seeds."""
        parts = [run_metrics(run) for run in self.done]
        names = [name for name in parts[0] if all(name in part for part in parts)] if parts else []
        return {name: spread([part[name] for part in parts]) for name in names}


def _settings(config: ConfigDict) -> dict[str, Value]:
    """The flat config without seeds, locations, and the keys that no parameter of this run depends on."""
    ignored = {*_IGNORED, *configs.free_keys(config)}
    return {key: value for key, value in configs.flatten(config).items() if key not in ignored}


def run_metrics(run: Record) -> dict[str, Spread]:
    """Returns the metrics in a run's result by `set/metric`, over its seeds."""
    metrics = {}
    for group, values in run.result.items():
        if isinstance(values, dict):
            for name, value in values.items():
                if name == "examples" or name.endswith("_std") or not isinstance(value, int | float):
                    continue
                many = isinstance(values.get(f"{name}_std"), int | float)
                n, std = (run.config.num_seeds, values[f"{name}_std"]) if many else (1, math.nan)
                metrics[f"{group}/{name}"] = Spread(n, float(value), float(std))
    return metrics


def shown(value: Value) -> str:
    """Formats a config value for people."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return value if isinstance(value, str) and value else repr(value)


def main_metric(runs: Sequence[Record]) -> tuple[str, float]:
    """Returns the main metric of the first finished run, and 1.0 if its greatest value is best, else -1.0."""
    reported = {name for run in runs for name in run_metrics(run)}
    first = next((run for run in runs if run.result), runs[0])
    best, sets = first.config.checkpoint.best, first.config.data.eval
    return ranking.main_metric(best, sets, reported) or (f"{next(iter(sets), 'test')}/accuracy", 1.0)


def group_runs(runs: Sequence[Record]) -> list[Group]:
    """Groups runs by config, ordered by the main metric with the best first, groups without a finished run last.

    If runs have the same config and seed, their directories distinguish groups of that config: see `_separate`.
    """
    settings = {run.name: _settings(run.config) for run in runs}
    by_settings = collections.defaultdict[str, list[Record]](list)
    for run in runs:
        by_settings[_text(settings[run.name])].append(run)
    separated = list[list[Record]]()
    for equal in by_settings.values():
        for directory, members in _separate(equal).items():
            separated.append(members)
            for run in members:
                settings[run.name][DIRECTORY] = directory
    keys = [key for key in (*configs.KEYS, DIRECTORY)
            if len({_text(values[key]) for values in settings.values() if key in values}) > 1]  # fmt: skip
    groups = [
        Group(
            {key: settings[members[0].name].get(key) for key in keys},
            [run for run in members if run.result],
            [run for run in members if not run.result],
        )
        for members in separated
    ]
    metric, sign = main_metric(runs)

    def rank(group: Group) -> float:
        value = group.metrics()[metric].mean if metric in group.metrics() else math.nan
        return math.inf if math.isnan(value) else -sign * value

    return sorted(groups, key=rank)


def best(groups: Sequence[Group], metric: str) -> Group | None:
    """Returns the first of the ordered groups if the main metric ranks it, as it cannot in runs without a head."""
    value = groups[0].metrics().get(metric)
    return groups[0] if value and not math.isnan(value.mean) else None


def differing_origins(groups: Sequence[Group]) -> list[str]:
    """Sentences on finished runs whose configs say the same, but which recorded different data, weights or code.

    Evaluation sets are compared between all runs; within a group, what training read and computed with.
    """
    found: dict[str, None] = {}
    for group in groups:
        for run in group.done[1:]:
            for one in find_differences(group.done[0].provenance, run.provenance):
                if one.what.startswith(("data.", "init_from.", "fixed_sha256", "modules.")):
                    found[f"{group.done[0].name} and {run.name} recorded a different {one.what}: their mean is of "
                          "different runs"] = None  # fmt: skip
    first: dict[tuple[str, str], Record] = {}
    for run in (run for group in groups for run in group.done):
        for name, text in run.config.data.eval.items():
            other = first.setdefault((run.config.data.source, text), run)
            if run.evals.get(name) != other.evals.get(name):
                found[f"{other.name} and {run.name} recorded a different evaluation set {name}={text!r}: their results "
                      "are not comparable"] = None  # fmt: skip
    return list(found)


def common(groups: Sequence[Group]) -> dict[str, Value]:
    """Returns the keys and values that all groups share, except locations and cadences."""
    first, *others = [_settings(run.config) for group in groups for run in (*group.done, *group.unfinished)]
    differing = {key for group in groups for key in group.settings}
    return {k: v for k, v in first.items() if k not in differing and all(k in other for other in others)}


def _separate(runs: Sequence[Record]) -> dict[str, list[Record]]:
    """Splits runs of one config by their parent directory if a seed is there twice; else returns {"": runs}.

    A second run of a seed in one parent directory is a group of its own, by its name.
    """
    if not _repeats(runs):
        return {"": list(runs)}
    groups = collections.defaultdict[str, list[Record]](list)
    for run in runs:
        siblings = groups[str(run.path.parent)]
        (groups[run.name] if _repeats([*siblings, run]) else siblings).append(run)
    return groups


def _repeats(runs: Iterable[Record]) -> bool:
    seeds = [seed for run in runs for seed in run.seeds]
    return len(set(seeds)) < len(seeds)


def _text(value: Value) -> str:
    return json.dumps(value, sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A group against the best one, on one evaluation set."""

    group: Group
    set: str
    examples: int
    difference: paired.Difference  # of the mean accuracies, this group's minus the best one's
    p: dict[int, float]  # McNemar's mid-p by seed that both have
    adjusted: dict[int, float]  # `p`, Holm-adjusted over all tests


def compare(groups: Sequence[Group], saved: Mapping[str, Correct]) -> list[Comparison]:
    """Compares each group with the best on each evaluation set for which all their runs have saved predictions."""
    comparisons: list[Comparison] = []
    best = groups[0]
    for name in best.done[0].config.data.eval if best.done else ():
        if (of_best := _join_seeds(best, name, saved)) is None:
            continue
        for group in groups[1:]:
            if (own := _join_seeds(group, name, saved)) is None:
                continue
            if group.done[0].evals.get(name) != best.done[0].evals.get(name):
                log.warning("%s: cannot pair %s with the best, because their examples differ", name, group.label)
                continue
            p = {seed: paired.mcnemar(own[seed], of_best[seed]) for seed in own if seed in of_best}
            first, second = (np.stack(list(each.values())) for each in (own, of_best))
            difference = paired.difference(first, second)
            comparisons.append(Comparison(group, name, first.shape[1], difference, p, {}))
    adjusted = iter(paired.holm([p for comparison in comparisons for p in comparison.p.values()]))
    return [dataclasses.replace(c, adjusted={seed: next(adjusted) for seed in c.p}) for c in comparisons]


def _join_seeds(group: Group, name: str, saved: Mapping[str, Correct]) -> dict[int, np.ndarray] | None:
    """Returns bool[n] by seed on a set; None unless every run of the group has predictions of the same examples."""
    have = [run for run in group.done if name in saved[run.name]]
    if not have or len(have) < len(group.done) or len({run.evals.get(name) for run in have}) > 1:
        return None
    return {seed: row for run in have for seed, row in zip(run.seeds, saved[run.name][name], strict=True)}

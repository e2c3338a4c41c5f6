"""Groups of runs that differ only in their seed, and the keys that distinguish the groups."""

import collections
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core.json_files import as_object
from imgclf_jax.core.typing import Json, JsonObject, Value
from imgclf_jax.run import ranking
from imgclf_jax.run.record import Record
from imgclf_jax.tools.compare.paired import Spread, spread

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
    for group, values in (run.final or {}).items():
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
    first = next((run for run in runs if run.final is not None), runs[0])
    name = next(iter(first.config.data.eval), "test")
    return ranking.main_metric(first.config, reported) or (f"{name}/accuracy", 1.0)


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
            [run for run in members if run.final is not None],
            [run for run in members if run.final is None],
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
    """Sentences on finished runs whose configs say the same, but which recorded different data or code.

    Evaluation sets are compared between all runs; within a group, what training read and computed with.
    """
    found: dict[str, None] = {}
    for group in groups:
        _note_differing(found, group.done, _training_facts, "their mean is of different runs")
    by_source = collections.defaultdict[str, list[Record]](list)
    for run in (run for group in groups for run in group.done):
        by_source[run.config.data.source].append(run)
    for runs in by_source.values():
        _note_differing(found, runs, _evaluation_facts, "their results are not comparable")
    return list(found)


def _training_facts(run: Record) -> JsonObject:
    recorded = run.provenance
    data = as_object(recorded.get("data"))
    facts: JsonObject = {
        "training data": data.get("fingerprint"),
        **as_object(recorded.get("modules")),
        "digest of init_from": as_object(recorded.get("init_from")).get("sha256"),
        "digest of the method's fixed arrays": recorded.get("fixed_sha256"),
        "number of BatchNorm groups": recorded.get("batch_norm_groups"),
        "digest of data.sampling": data.get("sampling"),
    }
    for name, stream in as_object(data.get("extra")).items():
        facts[f"fingerprint of data.extra.{name}"] = as_object(stream).get("fingerprint")
        facts[f"digest of the sampling of data.extra.{name}"] = as_object(stream).get("sampling")
    return facts


def _evaluation_facts(run: Record) -> JsonObject:
    return {f"evaluation set {name}={text!r}": run.evals.get(name) for name, text in run.config.data.eval.items()}


def _note_differing(
    found: dict[str, None], runs: Sequence[Record], facts: Callable[[Record], JsonObject], so: str
) -> None:
    """Adds a sentence for each fact that two of the runs recorded differently."""
    first: dict[str, tuple[Json, Record]] = {}
    for run in runs:
        for name, value in facts(run).items():
            before = first.setdefault(name, (value, run)) if value is not None else (None, run)
            if before[0] != value:
                found[f"{before[1].name} and {run.name} recorded a different {name}: {so}"] = None


def common(groups: Sequence[Group]) -> dict[str, Value]:
    """Returns the keys and values that all groups share, except locations and cadences."""
    first, *others = [_settings(run.config) for group in groups for run in (*group.done, *group.unfinished)]
    differing = {key for group in groups for key in group.settings}
    return {k: v for k, v in first.items() if k not in differing and all(k in other for other in others)}


def _separate(runs: Sequence[Record]) -> dict[str, list[Record]]:
    """Splits runs of one config into groups without a seed twice, by directory; {"": runs} if no seed is there twice.

    The runs of a parent directory stay together, with those of other parents that have other seeds. Of a run that is
    twice in one parent, the later ones by name are groups of their own.
    """
    if not _repeats(runs):
        return {"": list(runs)}
    by_parent = collections.defaultdict[Path, list[Record]](list)
    copies = list[Record]()
    for run in runs:
        siblings = by_parent[run.workdir.path.parent]
        (copies if _repeats([*siblings, run]) else siblings).append(run)
    groups = list[list[Record]]()
    for siblings in by_parent.values():
        fitting = next((group for group in groups if not _repeats([*group, *siblings])), None)
        if fitting is None:
            groups.append(list(siblings))
        else:
            fitting += siblings
    named = {os.path.commonpath([run.workdir.path.parent for run in group]): group for group in groups}
    if len(named) < len(groups):  # parents within one another
        named = {", ".join(dict.fromkeys(str(run.workdir.path.parent) for run in group)): group for group in groups}
    return named | {run.name: [run] for run in copies}


def _repeats(runs: Iterable[Record]) -> bool:
    seeds = [seed for run in runs for seed in run.seeds]
    return len(set(seeds)) < len(seeds)


def _text(value: Value) -> str:
    return json.dumps(value, sort_keys=True)

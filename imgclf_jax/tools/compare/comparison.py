"""Runs put together for a comparison: groups that differ in their seed alone, and what tells the groups apart."""

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from imgclf_jax import config as configs
from imgclf_jax.run.record import MAIN_METRICS, Record
from imgclf_jax.tools.compare.paired import Spread, spread

DIRECTORY = "directory"  # what tells groups apart that have the same config
# Keys whose value puts no run into another group.
_BY_ITSELF = ("seed", "num_seeds", *configs.LOCATION_KEYS, *configs.FREE_KEYS)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one config, but for their seeds."""

    settings: Mapping[str, Any]  # the keys that differ between groups
    done: Sequence[Record]
    unfinished: Sequence[Record]

    @property
    def label(self) -> str:
        """What the group is called."""
        return ", ".join(f"{key}={shown(value)}" for key, value in self.settings.items()) or "all runs"

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs that are done."""
        return sorted(seed for run in self.done for seed in run.seeds)

    def metrics(self) -> dict[str, Spread]:
        """`test/accuracy` and so on, over the seeds: what all runs that are done have."""
        parts = [metrics_of(run) for run in self.done]
        names = [name for name in parts[0] if all(name in part for part in parts)] if parts else []
        return {name: spread([part[name] for part in parts]) for name in names}


def metrics_of(run: Record) -> dict[str, Spread]:
    """The metrics in a run's result, by `set/metric`. Of a run of several seeds they are over these."""
    found = {}
    for group, values in (run.final or {}).items():
        if isinstance(values, dict):
            for name, value in values.items():
                if name == "examples" or name.endswith("_std") or not isinstance(value, int | float):
                    continue
                many = isinstance(values.get(f"{name}_std"), int | float)
                n, deviation = (run.config.num_seeds, values[f"{name}_std"]) if many else (1, math.nan)
                found[f"{group}/{name}"] = Spread(n, float(value), float(deviation))
    return found


def shown(value: Any) -> str:
    """A config's value as a person reads it."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return value if isinstance(value, str) and value else repr(value)


def main_metric(groups: Iterable[Group]) -> str:
    """The accuracy on the first evaluation set of the first run; for want of it, what the task is ranked by."""
    groups = list(groups)
    found = {name for one in groups for name in one.metrics()}
    for group in groups:
        for run in (*group.done, *group.unfinished):
            for name in run.config.data.eval:
                kinds = [kind for kind in MAIN_METRICS if f"{name}/{kind}" in found]
                return f"{name}/{kinds[0] if kinds else MAIN_METRICS[0]}"
    return "test/accuracy"


def group(runs: Sequence[Record]) -> list[Group]:
    """The groups of the runs, the best by the main metric first, those without a run that is done last.

    Where the same seed of the same config is there twice, the directory that the runs lie in tells the groups apart.
    """
    flat = {run.name: configs.flatten(run.config) for run in runs}
    own = {run.name: {k: v for k, v in flat[run.name].items() if k not in _BY_ITSELF} for run in runs}
    if _twice(runs, own):
        own = {run.name: own[run.name] | {DIRECTORY: str(run.workdir.path.parent)} for run in runs}
        if _twice(runs, own):
            own = {run.name: own[run.name] | {DIRECTORY: run.name} for run in runs}
    keys = [key for key in (*configs.KEYS, DIRECTORY)
            if len({_text(values[key]) for values in own.values() if key in values}) > 1]  # fmt: skip
    together = collections.defaultdict[str, list[Record]](list)
    for run in runs:
        together[_text(own[run.name])].append(run)
    groups = [
        Group(
            {key: own[some[0].name][key] for key in keys},
            [run for run in some if run.final is not None],
            [run for run in some if run.final is None],
        )
        for some in together.values()
    ]
    metric = main_metric(groups)

    def rank(group: Group) -> float:
        value = group.metrics()[metric].mean if metric in group.metrics() else math.nan
        return math.inf if math.isnan(value) else -value

    return sorted(groups, key=rank)


def common(groups: Sequence[Group]) -> dict[str, Any]:
    """The keys that no two groups differ in, and their values, without those that say where data lie."""
    first = next(run for one in groups for run in (*one.done, *one.unfinished))
    differing = {key for one in groups for key in one.settings}
    return {k: v for k, v in configs.flatten(first.config).items() if k not in differing and k not in _BY_ITSELF}


def _twice(runs: Sequence[Record], own: Mapping[str, Mapping[str, Any]]) -> bool:
    counts = collections.Counter((_text(own[run.name]), seed) for run in runs for seed in run.seeds)
    return any(count > 1 for count in counts.values())


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)

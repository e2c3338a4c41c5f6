"""Compares a result, such as one from another processor, with the spread over the recorded seeds."""

import contextlib
import math
import statistics
from typing import NamedTuple

from imgclf_jax import config as configs
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import decimals
from imgclf_jax.core.typing import JsonMapping
from imgclf_jax.run.ranking import main_metric
from imgclf_jax.run.record import Record

_WITHIN = 2.0  # standard errors


class Spread(NamedTuple):
    """The main metric of a result, and its mean and sample standard deviation over the recorded seeds."""

    metric: str
    here: float
    mean: float
    std: float
    seeds: int
    errors: float  # the difference in standard errors, std · √(1 + 1/seeds)

    def __str__(self) -> str:
        where = "within" if self.errors <= _WITHIN else "outside of"
        recorded = f"{decimals(self.mean)} ± {decimals(self.std)} over the {self.seeds} recorded seeds"
        return (f"{self.metric} is {decimals(self.here)} here and {recorded}: {where} their spread, at "
                f"{self.errors:.1f} standard errors")  # fmt: skip


def find_spread(record: Record, here: JsonMapping) -> Spread | None:
    """Compares `here`, the result of a reproduction, with those of `record` and of the same run with other seeds.

    These are runs and bundles in the folder of `record`. None if fewer than two seeds are recorded, if the run trained
    several at once, and if the reproduction has not ended where the record did.
    """
    own, several = _numbers(record, here), dict[int, dict[str, float]]()
    found = main_metric(record.config.checkpoint.best, record.config.data.eval, own)
    if found is None or here.get("step") != record.result.get("step") or record.config.num_seeds > 1:
        return None
    for path in sorted(record.path.parent.iterdir()):
        with contextlib.suppress(UserError, OSError):  # something else
            one = Record.load(str(path))
            if not configs.difference(record.config, one.config, ("seed",)):
                several[one.config.seed] = _numbers(record, one.result)
    metric = found[0]
    values = [result[metric] for result in several.values() if metric in result]
    if len(values) < 2:
        return None
    mean, std = statistics.mean(values), statistics.stdev(values)
    apart, error = abs(own[metric] - mean), std * math.sqrt(1 + 1 / len(values))
    errors = apart / error if error else math.inf if apart else 0.0
    return Spread(metric, own[metric], mean, std, len(values), errors)


def _numbers(record: Record, result: JsonMapping) -> dict[str, float]:
    return {f"{name}/{kind}": value for name in record.config.data.eval if isinstance(result.get(name), dict)
            for kind, value in result[name].items() if type(value) in (int, float)}  # fmt: skip

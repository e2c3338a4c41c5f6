"""The metric by which runs and checkpoints are ranked, and the best step by it: one rule for all that choose."""

import math
from collections.abc import Collection, Iterable

from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.core.typing import JsonMapping
from imgclf_jax.metrics import BEST

MAIN_METRICS = ("accuracy", "mean_average_precision")  # one per task; the greatest value is the best


def parse_best(text: str, key: str = "checkpoint.best") -> tuple[str, float]:
    """Returns the metric that `text` of a config's `key` names, and 1.0 if its greatest value is best, else -1.0.

    For example ("test/my_error", -1.0) for "min:test/my_error". Raises UserError for a metric of unknown direction.
    """
    direction, _, name = text.partition(":")
    if direction in ("min", "max"):
        return name, 1.0 if direction == "max" else -1.0
    if (kind := text.partition("/")[2]) not in BEST:
        raise UserError(f"{key}={text!r}: {unknown('metric', kind, BEST)}, or 'min:{text}' if the smallest value of "
                        f"your metric is best, 'max:{text}' if the greatest is")  # fmt: skip
    return text, BEST[kind]


def main_metric(best: str, sets: Iterable[str], reported: Collection[str]) -> tuple[str, float] | None:
    """The metric that ranks a run, such as "test/accuracy", and 1.0 if its greatest value is best, else -1.0.

    It is the first of these among the `reported` ones: the metric that chooses checkpoints, `best` (the key
    `checkpoint.best`), and the task's own on each of the evaluation `sets`. None if there is none.
    """
    chosen = [parse_best(best)] if best else []
    of_task = [(f"{name}/{kind}", 1.0) for name in sets for kind in MAIN_METRICS]
    return next((one for one in [*chosen, *of_task] if one[0] in reported), None)


def values_of(records: Iterable[JsonMapping], metric: str) -> list[tuple[int, float]]:
    """The recorded values of a metric, (step, value) in the order of steps."""
    found = {record["step"]: float(record[metric]) for record in records if type(record.get(metric)) in (int, float)}
    return sorted(found.items())


def find_best(values: Iterable[tuple[int, float]], sign: float) -> tuple[int, float] | None:
    """The best finite value and its step, the first one of equals. None if no value is finite.

    `values` are (step, value) in the order of steps. The greatest is best with `sign` 1.0, the smallest with -1.0.
    """
    finite = [(step, value) for step, value in values if math.isfinite(value)]
    return max(finite, key=lambda one: sign * one[1], default=None)

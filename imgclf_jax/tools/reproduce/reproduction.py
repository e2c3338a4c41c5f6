"""Comparison of a run with its reproduction: the first step and parameter that differ, and possible causes.

All functions take what runs record (see `run.record`): lines of digests.jsonl, records of metrics.jsonl, provenances.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

from imgclf_jax.core.json_files import as_object
from imgclf_jax.core.typing import Json, JsonMapping, JsonObject
from imgclf_jax.run.provenance import Difference, find_differences
from imgclf_jax.run.writers import TIMES

type Lines = tuple[Sequence[JsonMapping], Sequence[JsonMapping]]  # of digests.jsonl and metrics.jsonl

ROUNDING = 1e-3  # the largest relative difference of a metric that rounding may explain


class Value(NamedTuple):
    """A metric at a step, as recorded and as reproduced."""

    step: int
    name: str
    recorded: float
    here: float

    @property
    def relative(self) -> float:
        """The difference relative to the larger magnitude; infinite if only one value is finite."""
        a, b = self.recorded, self.here
        if a == b or (math.isnan(a) and math.isnan(b)):
            return 0.0
        difference = abs(a - b) / max(abs(a), abs(b))
        return difference if math.isfinite(difference) else math.inf


class Parameters(NamedTuple):
    """The parameters that differ at a step; without names if only digests of all parameters were recorded."""

    step: int
    names: tuple[str, ...]
    of: int  # the number of all parameters
    recorded: str  # the digest of the first one, or of all
    here: str
    equal_until: int | None  # the last earlier step with equal parameters


@dataclass(frozen=True)
class Comparison:
    """The compared digests and metrics, and the first difference."""

    digest_steps: tuple[int, ...]  # steps with compared parameters
    values: tuple[Value, ...]  # compared metrics in order of steps
    parameters: Parameters | None
    missing: tuple[tuple[int, str], ...] = ()  # (step, metric): recorded, but not reproduced
    absent: tuple[tuple[int, str], ...] = ()  # (step, metric or "parameters"): reproduced, but not recorded

    @property
    def first_value(self) -> Value | None:
        """The first metric that differs."""
        return next((value for value in self.values if value.relative), None)

    @property
    def largest(self) -> Value | None:
        """The metric with the largest difference; None if all are equal."""
        return max((value for value in self.values if value.relative), key=lambda v: v.relative, default=None)

    @property
    def first_step(self) -> int | None:
        """The first recorded step with a difference; None if there is none."""
        steps = [difference.step for difference in (self.parameters, self.first_value) if difference]
        return min([*steps, *(step for step, _ in self.missing[:1])], default=None)


def compare(
    recorded: tuple[Sequence[JsonMapping], Sequence[JsonMapping], JsonMapping],
    here: Lines, moved: bool = False,
) -> Comparison:  # fmt: skip
    """Compares (digests, metrics, result) of a run with (digests, metrics) of its reproduction.

    It compares digests and metrics at common steps, except times and speeds. A recorded metric up to the last
    reproduced step is `missing` if it was not reproduced or is no number. If the run was `moved`, since it went on with
    other cadences or another total, it logged at other steps: then nothing is missing, and means over other steps are
    not compared.
    """
    digests, metrics, result = recorded
    step = result.get("step")
    named = {f"{name}/{key}": value for name, group in result.items() if isinstance(group, dict)
             for key, value in group.items()}  # fmt: skip
    ended = [{**named, "step": step, "params_sha256": result.get("params_sha256")}] if type(step) is int else []
    new = {line["step"]: line for line in here[0]}
    both = sorted((line for line in (*digests, *ended) if line["step"] in new and line.get("params_sha256")),
                  key=lambda line: line["step"])  # fmt: skip

    def differs(line: JsonMapping) -> bool:  # older lines have the digest of all parameters alone
        own = new[line["step"]]
        return any(line.get(key, own[key]) != own[key] for key in ("params_sha256", "params"))

    wrong = next(filter(differs, both), None)

    values_here: dict[int, JsonObject] = {}
    for record in here[1]:
        values_here.setdefault(record["step"], {}).update(record)
    logged, logged_here = ({r["step"] for r in records if "train/loss" in r} for records in (metrics, here[1]))
    last = max(new, default=-1)
    values: dict[Value, None] = {}  # those in result.json are in metrics.jsonl, too
    missing = []
    for record in (*metrics, *ended):
        step = record["step"]
        for name, value in record.items():
            if name in (*TIMES, "step", "params_sha256") or step > last:
                continue
            if moved and name.startswith("train/") and _before(step, logged) != _before(step, logged_here):
                continue
            own: Json = values_here.get(step, {}).get(name)
            if _is_number(value) and _is_number(own):
                values[Value(step, name, value, own)] = None
            elif not moved:
                missing.append((step, name))
    return Comparison(
        tuple(dict.fromkeys(line["step"] for line in both)), tuple(sorted(values, key=lambda value: value.step)),
        _describe_parameters(wrong, new[wrong["step"]], [line["step"] for line in both]) if wrong else None,
        tuple(dict.fromkeys(missing)),
    )  # fmt: skip


def find_absent(
    recorded: Lines, here: Lines, due: Callable[[int], bool], until: int, moved: bool = False
) -> tuple[tuple[int, str], ...]:
    """What the (digests, metrics) of a run lack, and its reproduction has: (step, metric or "parameters").

    Looks up to step `until`. Digests are `due` at some steps. A metric that the record has at no step, next to others,
    is one that its version did not compute. If the run was `moved` (see `compare`), only its digests are looked for.
    """
    steps = {line["step"] for line in recorded[0]}
    found = {(line["step"], "parameters") for line in here[0] if due(line["step"]) and line["step"] not in steps}
    has = {(record["step"], name) for record in recorded[1] for name in record}
    known, groups = {name for _, name in has}, {(step, name.partition("/")[0]) for step, name in has}
    made = {(record["step"], name) for record in here[1] if not moved for name in record.keys() - {"step", *TIMES}}
    found |= {
        (step, name) for step, name in made - has if name in known or (step, name.partition("/")[0]) not in groups
    }
    return tuple(sorted((step, name) for step, name in found if step <= until))


def _describe_parameters(old: JsonMapping, new: JsonMapping, steps: Sequence[int]) -> Parameters:
    a, b = as_object(old.get("params")), as_object(new.get("params"))
    names = sorted(name for name in {**a, **b} if a.get(name) != b.get(name)) if a else []
    pair, key = ((a, b), names[0]) if names else ((old, new), "params_sha256")
    was, now = (str(each.get(key, "absent"))[:8] for each in pair)
    before = max((step for step in steps if step < old["step"]), default=None)
    return Parameters(old["step"], tuple(names), len({**a, **b}), was, now, before)


def _before(step: int, logged: set[int]) -> int:
    return max((s for s in logged if s < step), default=0)


def _is_number(value: Json) -> TypeGuard[float]:
    return type(value) in (int, float)


def list_differences(recorded: Sequence[JsonMapping], here: JsonMapping) -> list[Difference]:
    """The differences of all snapshots of a run from that of this process; those of its later starts name the step."""
    found: dict[tuple[str, str], Difference] = {}
    for snapshot in recorded:
        for one in find_differences(snapshot, here):
            later = f" from step {step} on" if (step := snapshot.get("step", 0)) and recorded[0] is not snapshot else ""
            found.setdefault((one.what, one.recorded), one._replace(what=one.what + later))
    return [one for one in found.values() if not one.what.startswith("keys.")]  # `reproduce` compares the configs


def verdict(compared: Comparison, found: Sequence[Difference], tolerance: float = 0.0) -> str:
    """Returns "same" (bit for bit), "tolerated", "incomplete", "rounding" or "different".

    - "tolerated": metrics were compared, and none differs by more than the relative `tolerance`.
    - "incomplete": same or tolerated, but the record lacks what every run records.
    - "rounding": only versions, devices or flags differ, and no metric by more than ROUNDING.
    """
    if compared.first_step is None:
        return "incomplete" if compared.absent else "same"
    largest = compared.largest.relative if compared.largest else 0.0
    if compared.missing:
        return "different"
    if tolerance and compared.values and largest <= tolerance:
        return "incomplete" if compared.absent else "tolerated"
    # Moved data are compared by fingerprint, and what changed the trace has a kind of its own.
    kinds = {difference.kind for difference in found} - {"place", "trace"}
    if kinds and kinds <= {"version", "device", "flags"} and compared.values and largest <= ROUNDING:
        return "rounding"
    return "different"

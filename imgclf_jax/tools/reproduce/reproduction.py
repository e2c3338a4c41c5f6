"""Comparison of a run with its reproduction: the first step and parameter that differ, and possible causes.

All functions take what runs record (see `run.record`): lines of digests.jsonl, records of metrics.jsonl, provenances.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from imgclf_jax.core.json_files import as_object
from imgclf_jax.core.typing import Json, JsonMapping, JsonObject
from imgclf_jax.run.provenance import OF_COMPILERS, code_changes, environment
from imgclf_jax.run.writers import TIMES

ROUNDING = 1e-3  # the largest relative difference of a metric that rounding may explain
# The packages that compute or load data, listed first.
_COMPUTE = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow", "scikit-learn", "tensorflow", "tensorflow-cpu")
# The kinds of the entries of `provenance.environment` that are no versions.
_KINDS = {
    **dict.fromkeys(("devices", "number of devices", "processes", "processor"), "device"),
    **dict.fromkeys(("XLA_FLAGS", "JAX options", *OF_COMPILERS), "flags"),
}


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

    @property
    def metric_steps(self) -> int:
        """The number of steps with compared metrics."""
        return len({value.step for value in self.values})


def compare(
    recorded: tuple[Sequence[JsonMapping], Sequence[JsonMapping], Json],
    here: tuple[Sequence[JsonMapping], Sequence[JsonMapping]], extended: Sequence[int] = (),
    other_cadences: bool = False,
) -> Comparison:  # fmt: skip
    """Compares (digests, metrics, result) of a run with (digests, metrics) of its reproduction.

    It compares digests and metrics at common steps, except times and speeds. A recorded metric up to the last
    reproduced step is `missing` if it was not reproduced or is no number.

    - `extended` are steps at which the run ended before it was extended. It logged there too, so its next means cover
      fewer steps.
    - `other_cadences`: the run logged at other steps for a while, so nothing is missing, and means over other steps are
      not compared.
    """
    digests, metrics, result = recorded
    old = {line["step"]: line for line in digests}
    if isinstance(result.get("step"), int):
        old.setdefault(result["step"], result)  # it has the digest of all parameters
    new = {line["step"]: line for line in here[0]}
    steps = tuple(s for s in sorted(old.keys() & new.keys()) if isinstance(old[s].get("params_sha256"), str))
    wrong = next((i for i, s in enumerate(steps) if _other_parameters(old[s], new[s])), None)
    parameters = None
    if wrong is not None:
        a, b = (as_object(line.get("params")) for line in (old[steps[wrong]], new[steps[wrong]]))
        names = sorted(name for name in {**a, **b} if a.get(name) != b.get(name)) if a and b else []
        pair = (a, b) if names else (old[steps[wrong]], new[steps[wrong]])
        was, now = (str(each.get(names[0] if names else "params_sha256", "absent"))[:8] for each in pair)
        before = steps[wrong - 1] if wrong else None
        parameters = Parameters(steps[wrong], tuple(names), len({**a, **b}), was, now, before)
    logged, once = ({r["step"] for r in records if "train/loss" in r} for records in (metrics, here[1]))
    short = {min((s for s in logged if s > step), default=-1) for step in extended if step not in once}
    if other_cadences:
        short = {s for s in logged & once if _before(s, logged) != _before(s, once)}
    recorded_values, values_here = _by_step([_flat(result), *metrics]), _by_step(here[1])
    last, excused = max(new, default=-1), {*extended, *short}
    asked = () if other_cadences else sorted(recorded_values)
    missing = ((step, name) for step in asked if step <= last and step not in excused
               for name, value in recorded_values[step].items()
               if not _is_number(value) or name not in values_here.get(step, {}))  # fmt: skip
    values = _values(recorded_values, values_here)
    compared = (value for value in values if not (value.step in short and value.name.startswith("train/")))
    return Comparison(steps, tuple(compared), parameters, tuple(missing))


def _other_parameters(old: JsonMapping, new: JsonMapping) -> bool:
    """Whether two lines of digests.jsonl differ, in the digest of all parameters or of single ones."""
    a, b = old.get("params"), new.get("params")
    return bool(old["params_sha256"] != new.get("params_sha256") or (isinstance(a, dict) and b and a != b))


def _before(step: int, logged: set[int]) -> int:
    return max((s for s in logged if s < step), default=0)


def _flat(result: JsonMapping) -> Json:
    """Flattens the metrics of a result to a record as in metrics.jsonl."""
    groups = {name: group for name, group in result.items() if isinstance(group, dict)}
    step = result.get("step")
    named = {f"{name}/{key}": value for name, group in groups.items() for key, value in group.items()}
    return {"step": step if isinstance(step, int) else -1, **named}


def _by_step(records: Iterable[JsonMapping]) -> dict[int, JsonObject]:
    """Merges the records of each step."""
    merged: dict[int, JsonObject] = {}
    for record in records:
        values = {name: value for name, value in record.items() if name != "step" and name not in TIMES}
        merged.setdefault(record["step"], {}).update(values)
    return merged


def _is_number(value: Json) -> bool:
    return type(value) in (int, float)


def _values(old: Mapping[int, JsonMapping], new: Mapping[int, JsonMapping]) -> Iterable[Value]:
    for step in sorted(old.keys() & new.keys()):
        for name, value in old[step].items():
            if _is_number(value) and _is_number(new[step].get(name)):
                yield Value(step, name, value, new[step][name])


class Difference(NamedTuple):
    """A difference of two runs that may explain different numbers."""

    kind: str  # config, data, weights, code; version, device, flags (which should only affect rounding); or place
    what: str
    recorded: str
    here: str


def differences(old: JsonMapping, new: JsonMapping) -> list[Difference]:
    """Lists the differences of two provenances, the most important first, without what either lacks."""
    found: list[Difference] = []

    def add(kind: str, what: str, a: Json, b: Json) -> None:
        if a is not None and b is not None and a != b:
            found.append(Difference(kind, what, _short(a), _short(b)))

    a, b = (as_object(p.get("data")) for p in (old, new))
    for key in ("fingerprint", "train_examples", "image_shape", "class_names", "class_counts", "target_names",
                "sampling"):  # fmt: skip
        add("data", key, a.get(key), b.get(key))
    a, b = (as_object(one.get("extra")) for one in (a, b))
    for name in sorted(a.keys() & b.keys()):
        for key in ("fingerprint", "train_examples", "image_shape", "sampling"):
            add("data", f"{key} of the stream {name}", as_object(a[name]).get(key), as_object(b[name]).get(key))
    a, b = (as_object(p.get("evals")) for p in (old, new))
    for name in sorted(a.keys() | b.keys()):
        add("data", f"fingerprint of the set {name}", a.get(name), b.get(name))
    if old and new:
        add("data", "unreadable files left out", *(as_object(p.get("unreadable")).get("files", []) for p in (old, new)))
        add("weights", "init_from", *(as_object(p.get("init_from")).get("sha256", "none") for p in (old, new)))
    add("code", "files of imgclf_jax", old.get("code"), new.get("code"))
    a, b = (as_object(p.get("modules")) for p in (old, new))
    for name in sorted(a.keys() & b.keys()):
        add("code", name, a[name], b[name])
    b = b | {"imgclf_jax": new.get("code")}
    for change in code_changes(old):
        for name, digest in change.get("files", {}).items():
            add("code", f"{name} from step {change['step']} on", digest, b.get(name))
        here = environment(new)
        for name, value in change.get("environment", {}).items():
            add(_KINDS.get(name, "version"), f"{name} from step {change['step']} on", value, here.get(name))
    git = [as_object(p.get("git")) for p in (old, new)]
    if any(d.kind == "code" for d in found) or not (old.get("code") and new.get("code")):
        add("code", "git commit", *(_commit(one) for one in git))
    add("version", "Python", old.get("python"), new.get("python"))
    key = "packages" if old.get("packages") and new.get("packages") else "versions"
    a, b = (as_object(p.get(key)) for p in (old, new))
    if a and b:
        shown = (a.keys() & b.keys()) | set(_COMPUTE) & {**a, **b}.keys()
        for name in sorted(shown, key=lambda name: (name not in _COMPUTE, name)):
            add("version", name, a.get(name, "absent"), b.get(name, "absent"))
        add("version", "packages in one only", *(_names(p.keys() - shown) for p in (a, b)))
    add("device", "devices", *(_devices(p.get("devices")) for p in (old, new)))
    add("device", "processor", old.get("processor"), new.get("processor"))
    add("device", "processes", old.get("processes"), new.get("processes"))
    add("device", "system", old.get("platform"), new.get("platform"))
    if isinstance(old.get("xla_flags"), str) and isinstance(new.get("xla_flags"), str):
        a, b = (_flags(p["xla_flags"]) | as_object(p.get("jax_options")) for p in (old, new))
        for name in sorted({**a, **b}):
            add("flags", name, a.get(name, "not set"), b.get(name, "not set"))
    a, b = (as_object(p.get("compiler_options")) for p in (old, new))
    for name in sorted(a.keys() & b.keys()):
        add("flags", name, a[name] or "not set", b[name] or "not set")
    return found


def _names(packages: Iterable[str]) -> str:
    """Formats the number of packages and the first names."""
    names = sorted(packages)
    return f"{len(names)}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}" if names else "none"


def _commit(git: JsonMapping) -> str | None:
    return f"{str(git['commit'])[:12]}{', changed' if git.get('changed') else ''}" if git.get("commit") else None


def _devices(value: Json) -> str | None:
    if not isinstance(value, list):
        return None
    return ", ".join(f"{value.count(name)} x {name}" for name in dict.fromkeys(map(str, value)))


def _flags(value: str) -> dict[str, str]:
    """Parses XLA_FLAGS to values by name; a flag without a value is "set"."""
    parts = (flag.partition("=") for flag in value.split())
    return {name: text if sign else "set" for name, sign, text in parts}


def _short(value: Json) -> str:
    text = str(value)
    return f"{text[:16]}…" if len(text) == 64 and text.isalnum() else text[:200]


def verdict(compared: Comparison, found: Sequence[Difference], tolerance: float = 0.0) -> str:
    """Returns "same" (bit for bit), "tolerated", "rounding" or "different".

    - "tolerated": metrics were compared, and none differs by more than the relative `tolerance`.
    - "rounding": only versions, devices or flags differ, and no metric by more than ROUNDING.
    """
    if compared.first_step is None:
        return "same"
    largest = compared.largest.relative if compared.largest else 0.0
    if compared.missing:
        return "different"
    if tolerance and compared.values and largest <= tolerance:
        return "tolerated"
    kinds = {difference.kind for difference in found} - {"place"}  # moved data are compared by fingerprint
    if kinds and kinds <= {"version", "device", "flags"} and compared.values and largest <= ROUNDING:
        return "rounding"
    return "different"

"""The plan of a sweep: the values of its keys, the resulting runs, and their directories."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core.errors import UsageError, UserError, unknown
from imgclf_jax.core.typing import Value

Settings = dict[str, str]  # the keys that a run sets, with values as on the command line

_NAME = 120  # longest name
_MAX = 10_000  # runs
_FORMS = "write 'KEY=VALUE; VALUE', 'KEY=0..4' for integers, or a Python list, \"KEY=['a', 'b']\""


def use_cpu(**_: object) -> None:
    """Keeps the sweep itself on CPU: each run is a separate process, and these get the accelerators."""
    os.environ["JAX_PLATFORMS"] = "cpu"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run of a sweep: the name of its directory, and the keys it sets."""

    name: str
    settings: Settings
    values: dict[str, Value]  # the settings as config values
    config: ConfigDict


def load_sweep(path_and_arg: str) -> list[dict[str, Value]] | None:
    """Returns the runs that a config file's `get_sweep()` plans, as a dict of keys each; None without that function.

    `path.py:arg` calls `get_sweep(arg)`. Raises UserError unless it returns a non-empty list of dicts.
    """
    path, _, arg = path_and_arg.partition(":")
    runs = configs.call(path, "get_sweep", arg)
    if runs is None:
        return None
    with contextlib.suppress(TypeError, ValueError):
        plan = [dict(run) for run in runs]
        if plan and all(isinstance(key, str) for run in plan for key in run):
            return plan
    raise UserError(f"config file {path}: get_sweep returns {runs!r}; return a list of dicts, such as "
                    "[{'seed': 0}, {'seed': 1}]")  # fmt: skip


def parse(text: str) -> tuple[str, list[str]]:
    """Parses the key and the values of `--sweep`, in one of three forms.

    - `model=mlp; cnn(width=32)`: values separated by semicolons
    - `seed=0..4`: integers, including the last one
    - `augment=['', 'flip_lr', 'pad_crop(2)|flip_lr']`: a list of Python literals, for any values

    Raises UserError for any other text, for no values, and for an empty value outside of a list.
    """
    key, sign, rest = (part.strip() for part in text.partition("="))
    if not sign or not key:
        raise UsageError(f"--sweep={text!r} must name a key and its values; {_FORMS}")
    key = key.removeprefix("config.")
    if not can_set(key):
        raise UsageError(f"--sweep={text!r}: " + unknown("config key", key, configs.KEYS))
    if rest.startswith("["):
        try:
            values = ast.literal_eval(rest)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as e:
            raise UsageError(f"--sweep={text!r}: {rest} is not a list of Python literals; {_FORMS}") from e
        if not values:
            raise UsageError(f"--sweep={text!r} has no values; {_FORMS}")
        return key, [_text(value, f"--sweep={text!r}") for value in values]
    match = re.fullmatch(r"(\d{1,10})\s*\.\.\s*(\d{1,10})", rest)
    if match and type(configs.KEYS.get(key, ("",))[0]) is int:
        first, last = int(match[1]), int(match[2])
        if not 0 <= last - first < _MAX:
            raise UsageError(f"--sweep={text!r}: the range must be ascending, with at most {_MAX} numbers")
        return key, [str(number) for number in range(first, last + 1)]
    parts = [part.strip() for part in rest.split(";")]
    if "" in parts:
        raise UsageError(f"--sweep={text!r}: a value is empty; {_FORMS}")
    return key, parts


def can_set(key: str) -> bool:
    """Whether a key can be set: a key of the config, an evaluation set or an extra stream."""
    in_dict = re.fullmatch(r"data\.(eval|extra)\.[^.]+", key)
    return (key in configs.KEYS and key not in ("data.eval", "data.extra")) or bool(in_dict)


def _text(value: Value, where: str) -> str:
    """Formats a value as on the command line."""
    if not isinstance(value, str | int | float):
        raise UserError(f"{where}: {value!r} is not a config value; allowed: strings, numbers, True and False")
    return value if isinstance(value, str) else repr(value)


def combine(planned: Sequence[dict[str, Value]] | None, sweeps: Iterable[str]) -> list[Settings]:
    """Combines the runs `planned` by the config file's `get_sweep` with every combination of `sweeps`.

    The last key of `sweeps` varies fastest. Raises UserError for a key that is given twice, and without any plan.
    """
    grid: dict[str, list[str]] = {}
    for text in sweeps:
        key, values = parse(text)
        if key in grid:
            raise UsageError(f"--sweep names {key} twice; write all its values in one flag, '{key}=VALUE; VALUE'")
        grid[key] = values
    runs = [{key: _text(value, "get_sweep()") for key, value in run.items()} for run in planned or [{}]]
    if wrong := [key for run in runs for key in run if not can_set(key)]:
        raise UserError("get_sweep(): " + unknown("config key", wrong[0], configs.KEYS))
    if planned is None and not grid:
        raise UsageError("a sweep needs values: --sweep 'schedule=constant(1e-3); constant(3e-3)', --sweep seed=0..2, "
                         "or a function get_sweep() in the config file")  # fmt: skip
    if both := [key for key in grid if any(key in run for run in runs)]:
        raise UserError(f"{both[0]} is both in the config file's get_sweep() and in --sweep; drop one of them")
    if (count := len(runs) * math.prod(map(len, grid.values()))) > _MAX:
        raise UserError(f"the sweep has {count} runs; at most {_MAX} are allowed")
    points = [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
    return [run | point for run in runs for point in points]


def make(settings: Sequence[Settings], make_config: Callable[[Settings], ConfigDict]) -> list[Run]:
    """Makes the runs of a plan; `make_config` returns the config of a run, and raises UserError for invalid values.

    Raises UserError for duplicate runs.
    """
    runs: dict[str, Run] = {}
    for own in settings:
        config = make_config(own)
        values = {key: functools.reduce(operator.getitem, key.split("."), config) for key in own}
        if any(run.values == values for run in runs.values()):
            raise UserError(f"the sweep has the run {', '.join(f'{k}={v!r}' for k, v in values.items()) or '{}'} twice;"
                            " name each once")  # fmt: skip
        name = _name(values, {name.casefold() for name in runs})  # some file systems ignore case
        runs[name] = Run(name, own, values, config)
    return list(runs.values())


def _name(values: dict[str, Value], taken: set[str]) -> str:
    """Names a run `key=value,key=value`, with a hash if that is long or taken."""
    name = ",".join(f"{key}={_safe(value)}" for key, value in values.items()) or "base"
    if len(name) > _NAME or name.casefold() in taken:
        digest = hashlib.sha256(repr(values).encode(errors="surrogatepass")).hexdigest()
        name = f"{name[: _NAME - 7]}-{digest[:6]}"
    return name


def _safe(value: Value) -> str:
    """Replaces characters that are special to shells, globs or file systems by dashes, with none at the ends."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", value).strip("-") if isinstance(value, str) else repr(value)

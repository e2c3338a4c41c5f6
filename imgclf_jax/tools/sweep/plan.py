"""The plan of a sweep: which values its keys take, the runs that follow, and their directories."""

import ast
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.run.provenance import read_json, write_json

FILE = "sweep.json"

Settings = dict[str, str]  # the keys that a run sets, and their values as on the command line

_VALUE = 28  # the longest that a value may be in a name
_NAME = 120  # the longest that a name may be
_MOST = 10_000  # runs
_FORMS = "write 'KEY=VALUE; VALUE', 'KEY=0..4' for whole numbers, or a Python list, \"KEY=['a', 'b']\""


def use_cpu(**_: Any) -> None:
    """Keeps the sweep itself on CPU: each run is a separate process, and these get the accelerators."""
    os.environ["JAX_PLATFORMS"] = "cpu"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep: its directory below the sweep's, and what it sets."""

    name: str
    settings: Settings
    values: dict[str, Any]  # the same as the config holds them
    config: ConfigDict = dataclasses.field(compare=False)

    @property
    def words(self) -> list[str]:
        """What its command line sets."""
        return [f"--config.{key}={text}" for key, text in self.settings.items()]


def parse(text: str) -> tuple[str, list[str]]:
    """The key and the values of `--sweep`, in one of three forms.

    - `model=mlp; cnn(width=32)`: values between semicolons; those in brackets and quotes belong to a value
    - `seed=0..4`: whole numbers, the last one included
    - `augment=['', 'flip', 'pad_crop(2)|flip']`: a list of Python literals, for any value

    Raises UserError for any other text, for no value, and for an empty one outside of a list.
    """
    key, sign, rest = (part.strip() for part in text.partition("="))
    if not sign or not key:
        raise UserError(f"--sweep={text!r} names no key and values; {_FORMS}")
    key = key.removeprefix("config.")
    if not known(key):
        raise UserError(f"--sweep={text!r}: " + unknown("config key", key, configs.KEYS))
    if rest.startswith("["):
        try:
            values = ast.literal_eval(rest)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as e:
            raise UserError(f"--sweep={text!r}: {rest} is not a list of Python literals; {_FORMS}") from e
        return key, [_text(value, f"--sweep={text!r}") for value in _not_empty(list(values), text)]
    match = re.fullmatch(r"(\d{1,10})\s*\.\.\s*(\d{1,10})", rest)
    if match and type(configs.KEYS.get(key, ("",))[0]) is int:
        first, last = int(match[1]), int(match[2])
        if not 0 <= last - first < _MOST:
            raise UserError(f"--sweep={text!r}: the last number must be the first one or more, and at most {_MOST} "
                            "more")  # fmt: skip
        return key, [str(number) for number in range(first, last + 1)]
    parts = [part.strip() for part in _split(rest, text)]
    if "" in parts:
        raise UserError(f"--sweep={text!r}: a value is empty; if you mean the empty text, write a Python list, "
                        f"\"{key}=['', 'x']\"")  # fmt: skip
    return key, parts


def known(key: str) -> bool:
    """Whether a key may be set: one of the config's, or that of an evaluation set or of a further stream."""
    one_of_several = re.fullmatch(r"data\.(eval|extra)\.[^.]+", key)
    return (key in configs.KEYS and key not in ("data.eval", "data.extra")) or bool(one_of_several)


def _not_empty(values: list[Any], text: str) -> list[Any]:
    if not values:
        raise UserError(f"--sweep={text!r} has no values; {_FORMS}")
    return values


def _text(value: Any, where: str) -> str:
    """A value as the command line has it."""
    if not isinstance(value, str | int | float):
        raise UserError(f"{where}: {value!r} is no value of a config key; allowed are texts, numbers, True and False")
    return value if isinstance(value, str) else repr(value)


def _split(values: str, text: str) -> list[str]:
    """Splits at each semicolon outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for c in values:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        if c == ";" and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += c
    if depth or quote:
        raise UserError(f"--sweep={text!r}: unbalanced brackets or quotes; a value that has such is written in a "
                        "Python list, \"KEY=['a', 'b']\"")  # fmt: skip
    return parts


def combine(planned: Sequence[dict[str, Any]] | None, sweeps: Iterable[str]) -> list[Settings]:
    """The settings of each run: those of the config file's `get_sweep`, each with every combination of `sweeps`.

    The last key of `sweeps` changes first. Raises UserError for a key that is given twice, and for no plan at all.
    """
    grid: dict[str, list[str]] = {}
    for text in sweeps:
        key, values = parse(text)
        if key in grid:
            raise UserError(f"--sweep names {key} twice; write all its values in one, '{key}=VALUE; VALUE'")
        grid[key] = values
    runs = [{key: _text(value, "get_sweep()") for key, value in run.items()} for run in planned or [{}]]
    if wrong := [key for run in runs for key in run if not known(key)]:
        raise UserError("get_sweep(): " + unknown("config key", wrong[0], configs.KEYS))
    if planned is None and not grid:
        raise UserError("a sweep wants values: --sweep 'schedule=constant(1e-3); constant(3e-3)' or --sweep seed=0..2, "
                        "or a function get_sweep() in the config file")  # fmt: skip
    if both := [key for key in grid if any(key in run for run in runs)]:
        raise UserError(f"{both[0]} is in the config file's get_sweep() and in --sweep; leave out one of them")
    count = len(runs)
    for values in grid.values():
        count *= len(values)
    if count > _MOST:
        raise UserError(f"the sweep has {count} runs; at most {_MOST} are allowed")
    points = [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
    return [run | point for run in runs for point in points]


def value_of(config: ConfigDict, key: str) -> Any:
    """The value of a key such as `data.eval.test`, by its path."""
    for part in key.split("."):
        config = config[part]
    return config


def make(
    settings: Sequence[Settings], configured: Callable[[Settings], ConfigDict], recorded: dict[str, dict[str, Any]]
) -> list[Run]:
    """The runs of a plan. `configured` gives the config of a run, and raises UserError for values that none can have.

    `recorded` has the values of runs by their names, which they keep. Raises UserError for two runs that are the same.
    """
    names = {_identity(values): name for name, values in recorded.items()}
    taken = {name.casefold() for name in recorded}  # some file systems do not tell upper case from lower case
    runs: dict[str, Run] = {}
    for own in settings:
        config = configured(own)
        values = {key: value_of(config, key) for key in own}
        name = names.get(_identity(values)) or _free_name(own, taken)
        if name in runs:
            raise UserError(f"the sweep has the run {', '.join(f'{k}={v!r}' for k, v in values.items()) or '{}'} twice;"
                            " name each once")  # fmt: skip
        names[_identity(values)] = name
        taken.add(name.casefold())
        runs[name] = Run(name, own, values, config)
    return list(runs.values())


def _identity(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _free_name(settings: Settings, taken: set[str]) -> str:
    """The name of a run: `key=value,key=value`. One that is taken, by other values, gets a hash of its own."""
    whole = ",".join(f"{key}={text}" for key, text in settings.items())
    name = ",".join(f"{_safe(key)}={_short(text)}" for key, text in settings.items()) or "base"
    if len(name) > _NAME:
        name = f"{name[: _NAME - 7]}-{_hash(whole)}"
    return f"{name}-{_hash(whole)}" if name.casefold() in taken else name


def _safe(text: str) -> str:
    """The text with a dash for what upsets a shell, a glob or a file system, none at its ends but for a minus."""
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).rstrip("-.")
    return safe if re.match(r"-[0-9.]", text) else safe.lstrip("-.")


def _short(text: str) -> str:
    safe = _safe(text)
    return safe if len(safe) <= _VALUE else f"{safe[: _VALUE - 7].rstrip('-.')}-{_hash(text)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:6]


def load(file: Path, base: ConfigDict, keys: set[str]) -> dict[str, dict[str, Any]]:
    """The runs that a plan's file records, by name; {} if there is none.

    Raises UserError if it is damaged, if its keys are others than `keys`, or if the config `base`, without them, is
    another one.
    """
    if not file.is_file():
        return {}
    try:
        plan = read_json(file)
        old, runs = configs.from_json(json.dumps(plan["base"]), str(file)), dict(plan["runs"])
        old_keys = set(plan["keys"])
        if not all(isinstance(values, dict) and set(values) <= old_keys for values in runs.values()):
            raise TypeError
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{file} is damaged; remove it, and run the same command again: runs that are there keep "
                        "their directories") from e  # fmt: skip
    if old_keys != keys:
        then, now = (", ".join(sorted(names)) or "no key" for names in (old_keys, keys))
        raise UserError(f"{file.parent} holds a sweep of {then}, and this one is of {now}; sweep the same keys, or "
                        "pass another --workdir")  # fmt: skip
    lines = configs.difference(old, base)
    if lines := [line for line in lines if line.partition(":")[0] not in keys]:
        raise UserError(f"{file.parent} holds a sweep with another config ({'; '.join(lines)}); use the old values, or "
                        "pass another --workdir")  # fmt: skip
    return runs


def save(
    file: Path, config_file: str, base: ConfigDict, keys: Sequence[str], runs: Sequence[Run],
    recorded: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    """Writes the plan: the config, the keys, and the values of each run by its directory's name."""
    all_runs = recorded | {run.name: run.values for run in runs}
    write_json(file, {"config": config_file, "keys": list(keys), "runs": all_runs, "base": base.to_dict()})

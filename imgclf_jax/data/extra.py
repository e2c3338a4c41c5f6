"""Extra streams of a run, `data.extra`, such as unlabeled images besides the labeled ones.

A stream is a spec: `SOURCE/SPLIT`, or a split of `data.source`, followed by options joined by `|`.
"""

import keyword
from dataclasses import dataclass

from ml_collections import ConfigDict

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.data import sampling

# Keys of a batch or the input of a loss, which no stream can have as its name.
_TAKEN = ("image", "label", "target", "id", "epoch", "step", "mask", "table", "other", "weight")


@dataclass(frozen=True)
class ExtraSpec:
    """An entry of `data.extra`, with the run's own values as defaults."""

    source: str  # "" for a split of `data.source`
    split: str  # "" for `train` or the only split
    batch_size: int
    preprocess: str
    sampling: str


def parse(config: ConfigDict, name: str) -> ExtraSpec:
    """Parses the entry `name` of `data.extra`. Raises UserError naming its key if no run can use it."""
    text, key = config.data.extra[name], f"data.extra.{name}"
    if name in _TAKEN or not name.isidentifier() or keyword.iskeyword(name):
        why = "batches use this name for something else" if name in _TAKEN else "it must be a Python name"
        raise UserError(f"{key}: {why}; rename the stream, for example 'unlabeled'")
    head, *options = spec.split_calls(text)
    if ")" not in head:
        source, split = "", head
    elif head.strip().endswith(")"):
        source, split = head, ""
    else:
        source, _, split = head.rpartition("/")
    values = {"batch_size": int(config.batch_size), "preprocess": config.preprocess, "sampling": "permutation"}
    seen = set()
    for option in options:
        call = spec.parse_one(option)
        if call.name not in values or call.name in seen:
            raise UserError(f"{key}={text!r}: " + (f"{call.name} occurs twice" if call.name in seen else
                                                    unknown("option", call.name, values)))  # fmt: skip
        kind = type(values[call.name])
        if len(call.args) != 1 or call.kwargs or type(call.args[0]) is not kind:
            example = {"batch_size": "batch_size(256)", "preprocess": "preprocess('decode(3)|resize(32)')",
                       "sampling": "sampling('balanced')"}[call.name]  # fmt: skip
            raise UserError(f"{key}={text!r}: write {example}, not {call}")
        seen.add(call.name)
        values[call.name] = call.args[0]
    if not (source.strip() or split.strip()):
        raise UserError(f"{key}={text!r} names no source; write \"folder('crops')/train\", or a split of data.source, "
                        "such as 'train[10%:]'")  # fmt: skip
    if values["batch_size"] < 1:
        raise UserError(f"{key}={text!r}: batch_size must be 1 or more")
    if source.strip():
        spec.parse_one(source)
    sampling.check_name(values["sampling"])
    return ExtraSpec(source.strip(), split.strip(), **values)


def parse_all(config: ConfigDict) -> dict[str, ExtraSpec]:
    """Parses all entries of `data.extra`, sorted by name; results do not depend on their order."""
    return {name: parse(config, name) for name in sorted(config.data.extra)}


def check(config: ConfigDict) -> None:
    """Raises UserError for values of `data.sampling` and `data.extra` that no run can use. Opens no data."""
    sampling.check_name(config.data.sampling)
    parse_all(config)

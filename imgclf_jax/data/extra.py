"""Further streams of a run, `data.extra`: unlabeled images beside the labeled ones, say.

A stream is a spec: `SOURCE/SPLIT`, or a split of `data.source`, then options joined by `|`.
"""

import keyword
from dataclasses import dataclass

from ml_collections import ConfigDict

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.data import sampling

# What a batch, a chunk or the input of a loss holds beside the streams.
_TAKEN = ("image", "label", "target", "id", "epoch", "step", "mask", "table", "other", "weight")


@dataclass(frozen=True)
class ExtraSpec:
    """What an entry of `data.extra` says, with the run's own values where it says nothing."""

    source: str  # "" for a split of `data.source`
    split: str  # "" for `train`, or the only one
    batch_size: int
    preprocess: str
    sampling: str


def parse(config: ConfigDict, name: str) -> ExtraSpec:
    """The entry `name` of `data.extra`. Raises UserError naming its key for one that no run could use."""
    text, key = config.data.extra[name], f"data.extra.{name}"
    if name in _TAKEN or not name.isidentifier() or keyword.iskeyword(name):
        why = f"a batch has something else called {name!r}" if name in _TAKEN else "it must be a Python name"
        raise UserError(f"{key}: {why}; give the stream another name, such as 'unlabeled'")
    head, *options = spec.split_calls(text)
    source, _, split = head.rpartition("/") if not head.strip().endswith(")") and ")" in head else (
        (head, "", "") if ")" in head else ("", "", head))  # fmt: skip
    found = {"batch_size": int(config.batch_size), "preprocess": config.preprocess, "sampling": "permutation"}
    given = set()
    for option in options:
        call = spec.parse_one(option)
        if call.name not in found or call.name in given:
            raise UserError(f"{key}={text!r}: " + (f"{call.name} is given twice" if call.name in given else
                                                    unknown("option", call.name, found)))  # fmt: skip
        kind = type(found[call.name])
        if len(call.args) != 1 or call.kwargs or type(call.args[0]) is not kind:
            example = {"batch_size": "batch_size(256)", "preprocess": "preprocess('decode(3)|resize(32)')",
                       "sampling": "sampling('balanced')"}[call.name]  # fmt: skip
            raise UserError(f"{key}={text!r}: write {example}, not {call}")
        given.add(call.name)
        found[call.name] = call.args[0]
    if not (source.strip() or split.strip()):
        raise UserError(f"{key}={text!r} names no source; write \"folder('crops')/train\", or a split of data.source, "
                        "such as 'train[10%:]'")  # fmt: skip
    if found["batch_size"] < 1:
        raise UserError(f"{key}={text!r}: batch_size must be 1 or more")
    if source.strip():
        spec.parse_one(source)
    sampling.check_name(found["sampling"])
    return ExtraSpec(source.strip(), split.strip(), **found)


def parse_all(config: ConfigDict) -> dict[str, ExtraSpec]:
    """All entries of `data.extra`, by their names in order, on which no result depends."""
    return {name: parse(config, name) for name in sorted(config.data.extra)}


def check(config: ConfigDict) -> None:
    """Raises UserError for what `data.sampling` and `data.extra` say and no run could use, before data are opened."""
    sampling.check_name(config.data.sampling)
    parse_all(config)

"""Scores that are not those of new data: sets that share examples with training, or that a run selects by."""

import inspect
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import datasets
from imgclf_jax.config import selecting_metrics
from imgclf_jax.core import paths, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.split_folders import role_of
from imgclf_jax.data import sampling, sources, splits
from imgclf_jax.data.source import Source
from imgclf_jax.run.workdir import Workdir

_MANY = 10**12  # examples that a split of unknown size is taken to have
_MAY_LEAVE_OUT = ("weighted", "subset")  # samplings that may never draw an example


def selecting_sets(config: ConfigDict) -> dict[str, str]:
    """The evaluation sets that choose what a run ends with, each with the key that names it."""
    found: dict[str, str] = {}
    for key, metric in selecting_metrics(config).items():
        text = config.stop if key == "stop" else metric
        found.setdefault(metric.removeprefix("min:").removeprefix("max:").partition("/")[0], f"{key}={text!r}")
    return found


def selection_warnings(config: ConfigDict) -> list[str]:
    """A sentence for each set that a run selects by and that is also its result: a test set, or its only set."""
    return [
        f"{key} selects on the set {name}, so its score there is no longer that of new data; hold out a part of the "
        "training split to select on, such as data.train='train[:90%]' and data.eval.val='train[90%:]'"
        for name, key in selecting_sets(config).items()
        if name in config.data.eval and (role_of(name) == "test" or len(config.data.eval) == 1)
    ]


def overlap_warnings(trained: ConfigDict, data: ConfigDict, base: Mapping[str, Source]) -> list[str]:
    """A sentence for each evaluation set that shares examples with what a run reads: `data.train` and `data.extra`.

    `trained` is the config of the run, `data` the keys `data` of the evaluation, and `base` the splits of its
    `data.source`. Examples that `weighted` or `subset` never draws are not shared; a user's own sampling is taken to
    draw all. The sizes of another source's splits are unknown, so sets and streams of one are compared as if it had any
    number of examples, all of which are read.
    """
    source, found = _identity(data.source), []
    evals = {name: _source_and_split(text, source) for name, text in data.eval.items()}
    for stream in _streams(trained):
        texts = {name: split for name, (other, split) in evals.items() if other == stream.source}
        if stream.source == source:
            sizes = {name: split.size for name, split in base.items()}
            read = stream.split or ("train" if len(base) > 1 else next(iter(base)))
        else:
            read = stream.split or "train"
            sizes = dict.fromkeys(splits.base_splits("+".join([read, *texts.values()])), _MANY)
        try:
            shared = splits.count_shared(read, texts, sizes)
            overlapping = {name: texts[name] for name, (count, _) in shared.items() if count}
            selects = spec.parse_one(stream.sampling).name in _MAY_LEAVE_OUT
            if overlapping and selects and stream.source == source:
                shared = _count_drawn(read, stream.sampling, overlapping, base)
        except UserError:  # the training split or its weights are gone, and only evaluation sets are needed
            continue
        for name, (count, size) in shared.items():
            many = f"{count:,} of its {size:,} examples" if stream.source == source else "examples"
            if count:
                found.append(f"the evaluation set {name} shares {many} with {stream.name} {read!r}: {stream.then} "
                             f"{texts[name]!r}")  # fmt: skip
    return found


def _count_drawn(
    read: str, sampled: str, texts: Mapping[str, str], base: Mapping[str, Source]
) -> dict[str, tuple[int, int]]:
    """`splits.count_shared` of the examples of the split `read` that the sampling draws."""
    source = sources.take_split(base, read)
    sampler = sampling.build(sampled, source)
    left = np.ones(source.size, bool)
    if sampler.drawn is not None:
        left = np.bincount(sampler.drawn, minlength=source.size) > 0
    sizes = {name: split.size for name, split in base.items()}
    drawn = {name: np.zeros(size, bool) for name, size in sizes.items()}
    for part in splits.resolve(read, sizes):
        own, left = np.split(left, [part.stop - part.start])
        drawn[part.name][part.start : part.stop] |= own
    counts = {}
    for name, text in texts.items():
        ranges = [drawn[part.name][part.start : part.stop] for part in splits.resolve(text, sizes)]
        counts[name] = sum(int(one.sum()) for one in ranges), sum(map(len, ranges))
    return counts


def initial_warnings(config: ConfigDict, base: Mapping[str, Source]) -> list[str]:
    """The `overlap_warnings` of the run that `init_from` names, for the sets of `config`; [] for a file of weights."""
    if not config.init_from:
        return []
    place = Workdir(paths.expand_user(config.init_from))
    try:
        trained = place.load_config() if place.config.is_file() else None
    except UserError:  # whoever reads its weights says what is wrong
        trained = None
    found = overlap_warnings(trained, config.data, base) if trained else []
    return [f"the weights of init_from={config.init_from!r} are of a run for which this holds: {one}" for one in found]


class _Stream(NamedTuple):
    """What a run reads, and the end of the warning if that shares examples with an evaluation set."""

    name: str
    source: str
    split: str  # "" for `train` or the only split
    sampling: str
    then: str


def _streams(trained: ConfigDict) -> list[_Stream]:
    """What a run reads."""
    source, then = _identity(trained.data.source), "its scores are not those of new data; train on a split without"
    found = [_Stream("the training split", source, trained.data.train, trained.data.sampling, then)]
    if spec.parse_one(trained.method).name == "supervised":  # which reads no further stream
        return found
    for name, stream in datasets.extra_streams(trained).items():
        then = ("if the method learns from these images, its scores are transductive, not those of new data; else give "
                "the stream a split without")  # fmt: skip
        own = _identity(stream.source) or source
        found.append(_Stream(f"data.extra.{name},", own, stream.split, stream.sampling, then))
    return found


def _source_and_split(text: str, source: str) -> tuple[str, str]:
    """The source and the split of a value of `data.eval`; one without a source is of `source`."""
    own, split = datasets.split_source(text)
    return _identity(own) or source, split


def _identity(source: str) -> str:
    """A source's spec as one text, however it is written: with the names of all arguments, and with whole paths."""
    return "|".join(str(_complete(call)) for call in spec.parse(source))


def _complete(call: spec.Call) -> spec.Call:
    """The call with its defaults; unchanged if it is of a user's function, which is not imported, or does not fit."""
    try:
        bound = inspect.signature(sources.SOURCES[call.name]).bind(*call.args, **call.kwargs)
    except (KeyError, TypeError):
        return call
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if name in ("path", "root") and value and isinstance(value, str):
            bound.arguments[name] = os.path.realpath(os.path.expanduser(value))
    return spec.Call(call.name, (), bound.arguments)

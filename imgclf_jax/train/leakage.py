"""Scores that are not those of new data: sets that share examples with training, or that a run selects by."""

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from imgclf_jax.config import selecting_metrics
from imgclf_jax.core import places, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.split_folders import role_of
from imgclf_jax.data import extra, sources, splits
from imgclf_jax.run.workdir import Workdir

_MANY = 10**12  # examples that a split of unknown size is taken to have
_OF_ALL_EXAMPLES = {"permutation", "balanced", "weighted", "repeated", "curriculum"}  # of `data.sampling`


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


def overlap_warnings(trained: ConfigDict, data: ConfigDict, base: Mapping[str, sources.Source]) -> list[str]:
    """A sentence for each evaluation set that shares examples with what a run reads: `data.train` and `data.extra`.

    `trained` is the config of the run, `data` the keys `data` of the evaluation, and `base` the splits of its
    `data.source`. A stream is skipped if its sampling may leave out examples. The sizes of another source's splits are
    unknown, so sets and streams of one are compared as if it had any number of examples.
    """
    source, found = _same_text(data.source), []
    evals = {name: _source_and_split(text, source) for name, text in data.eval.items()}
    for stream in _streams(trained):
        texts = {name: split for name, (other, split) in evals.items() if other == stream.source}
        if stream.source == source:
            sizes = {name: len(split) for name, split in base.items()}
            read = stream.split or ("train" if len(base) > 1 else next(iter(base)))
        else:
            read = stream.split or "train"
            sizes = dict.fromkeys(splits.base_splits("+".join([read, *texts.values()])), _MANY)
        try:
            shared = splits.count_shared(read, texts, sizes)
        except UserError:  # the training split is gone, and only evaluation sets are needed
            continue
        for name, (count, size) in shared.items():
            many = f"{count:,} of its {size:,} examples" if stream.source == source else "examples"
            if count:
                found.append(f"the evaluation set {name} shares {many} with {stream.name} {read!r}: {stream.then} "
                             f"{texts[name]!r}")  # fmt: skip
    return found


def initial_warnings(config: ConfigDict, base: Mapping[str, sources.Source]) -> list[str]:
    """The `overlap_warnings` of the run that `init_from` names, for the sets of `config`; [] for a file of weights."""
    if not config.init_from:
        return []
    place = Workdir(places.expand_user(config.init_from))
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
    then: str


def _streams(trained: ConfigDict) -> list[_Stream]:
    """What a run reads whole."""
    source, found = _same_text(trained.data.source), []
    if _reads_all(trained.data.sampling):
        then = "its scores are not those of new data; train on a split without"
        found.append(_Stream("the training split", source, trained.data.train, then))
    if spec.parse_one(trained.method).name == "supervised":  # which reads no further stream
        return found
    for name, stream in extra.parse_all(trained).items():
        then = ("if the method learns from these images, its scores are transductive, not those of new data; else give "
                "the stream a split without")  # fmt: skip
        if _reads_all(stream.sampling):
            found.append(_Stream(f"data.extra.{name},", _same_text(stream.source) or source, stream.split, then))
    return found


def _reads_all(text: str) -> bool:
    return not {call.name for call in spec.parse(text)} - _OF_ALL_EXAMPLES


def _source_and_split(text: str, source: str) -> tuple[str, str]:
    """The source and the split of a value of `data.eval`; one without a source is of `source`."""
    own, _, split = text.rpartition("/") if ")" in text else ("", "", text)
    return _same_text(own) or source, split


def _same_text(source: str) -> str:
    """A source's spec as one text, however it is written."""
    return "|".join(map(str, spec.parse(source)))

"""Scores that are not those of new data: sets that share examples with training, or that a run selects by."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from imgclf_jax.config import selecting_metrics
from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.split_folders import role_of
from imgclf_jax.data import sources, splits

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


def overlap_warnings(trained: ConfigDict, evals: Mapping[str, str], base: Mapping[str, sources.Source]) -> list[str]:
    """A sentence for each evaluation set that shares examples with the training split of the source `base`.

    `trained` are the `data` keys of the run, `evals` splits by name; those of another source are skipped, and so are
    all if the sampling may leave out examples of the split.
    """
    if {call.name for call in spec.parse(trained.sampling)} - _OF_ALL_EXAMPLES:
        return []
    train = trained.train
    try:
        shared = splits.count_shared(train, evals, {name: len(source) for name, source in base.items()})
    except UserError:  # the training split is gone, and only evaluation sets are needed
        return []
    return [
        f"the evaluation set {name} shares {count:,} of its {size:,} examples with the training split {train!r}: its "
        f"scores are not those of new data; train on a split without {evals[name]!r}"
        for name, (count, size) in shared.items()
        if count
    ]

"""Warnings about evaluation sets that training shares or selects on."""

import contextlib
from collections.abc import Mapping

from ml_collections import ConfigDict

from imgclf_jax import datasets
from imgclf_jax.config import selecting_metrics
from imgclf_jax.core import paths, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.split_folders import role_of
from imgclf_jax.data import splits
from imgclf_jax.data.source import Source
from imgclf_jax.run.workdir import Workdir


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
    """A sentence for each evaluation set that shares examples with `data.train` or a stream of `data.extra`.

    `trained` is the config of the run, `data` the keys `data` of the evaluation, and `base` the splits of its
    `data.source`. Compares splits of this source alone, and no split of which `data.sampling` draws a subset.
    """
    if trained.data.source != data.source:
        return []
    draws_all = spec.parse_one(trained.data.sampling).name not in ("subset", "weighted")
    reads = {"data.train": trained.data.train} if draws_all else {}
    if spec.parse_one(trained.method).name != "supervised":  # which reads no extra stream
        reads |= {f"data.extra.{name}": stream.split or "train"
                  for name, stream in datasets.extra_streams(trained).items() if not stream.source}  # fmt: skip
    found, sizes = [], {name: source.size for name, source in base.items()}
    for key, read in reads.items():
        with contextlib.suppress(UserError):  # the training split is gone, and only evaluation sets are needed
            shared = splits.count_shared(read, data.eval, sizes)
            found += [f"the evaluation set {name} shares {count:,} of its {size:,} examples with {key}={read!r}: its "
                      f"scores are not those of new data; use a split without {data.eval[name]!r}"
                      for name, (count, size) in shared.items() if count]  # fmt: skip
    return found


def initial_warnings(config: ConfigDict, base: Mapping[str, Source]) -> list[str]:
    """The `overlap_warnings` of the run that `init_from` names, for the sets of `config`; [] for a file of weights."""
    folder = Workdir(paths.as_path(config.init_from))
    if not config.init_from or not folder.config.is_file():
        return []
    found = overlap_warnings(folder.load_config(), config.data, base)
    return [f"the weights of init_from={config.init_from!r} are of another run: {one}" for one in found]

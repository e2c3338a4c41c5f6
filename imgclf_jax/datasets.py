"""Opens the data that a config names. It alone reads the keys `data.*` and `preprocess`; `data/` takes their values."""

import keyword
from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from imgclf_jax.core import processes, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode, sampling, sources
from imgclf_jax.data.source import Source
from imgclf_jax.data.stream import Images

# Keys of a batch or of the input of a loss, which no stream can have as its name.
_TAKEN = ("image", "label", "target", "id", "epoch", "step", "mask", "table", "other", "weight")


class ExtraStream(NamedTuple):
    """An entry of `data.extra`, with the run's own values as defaults."""

    source: str  # "" for a split of `data.source`
    split: str  # "" for `train` or the only split
    batch_size: int
    preprocess: str
    sampling: str


def open_data(config: ConfigDict, text: str = "") -> dict[str, Source]:
    """Opens the base splits of `data.source`, or of the source spec `text`, with the other keys of the config.

    Process 0 goes first, so the others reuse what it prepares, downloads or scans. Raises UserError if the
    data are missing, and unless all processes read the same.
    """
    data = config.data
    opened: dict[str, Source] = processes.first_in_process_0(
        lambda: sources.open_splits(text or data.source, data.data_dir, data.manual_dir, data.unreadable)
    )
    processes.agree(lambda: {f"the data of split {name}": source.fingerprint[:12] for name, source in opened.items()},
                    fix="all processes must read the same data: see data.source and data.data_dir")  # fmt: skip
    return opened


def open_train_images(config: ConfigDict, base: Mapping[str, Source] | None = None) -> Images:
    """Opens the training images of a config, in all processes, with `data.extra`; `base` are its sources, if open."""
    base = open_data(config) if base is None else base
    source = sources.take_split(base, config.data.train)
    extra = {name: _extra_images(config, name, one, base, source.bits) for name, one in extra_streams(config).items()}
    sampler = _sampler(config.data.sampling, source, "data.sampling")
    return Images(source, config.preprocess, config.seed, config.data.workers, sampler, extra)


def eval_images(source: Source, config: ConfigDict, bits: int | None = None) -> Images:
    """The images of a source with the host ops of evaluation; `bits` are the run's (see `Images`)."""
    preprocess = decode.evaluation_spec(config.preprocess_eval, config.preprocess)
    return Images(source, preprocess, config.seed, config.data.workers, bits=bits, key="preprocess_eval")


def _extra_images(config: ConfigDict, name: str, stream: ExtraStream, base: Mapping[str, Source], bits: int) -> Images:
    """Opens a stream of `data.extra`. Raises UserError naming its key."""
    try:
        opened = open_data(config, stream.source) if stream.source else base
        split = stream.split or ("train" if len(opened) > 1 else next(iter(opened)))
        source = sources.take_split(opened, split)
        sampler = _sampler(stream.sampling, source, "sampling")
        return Images(source, stream.preprocess, config.seed, config.data.workers, sampler, bits=bits)
    except UserError as e:
        raise UserError(f"data.extra.{name}: {e}") from e


def _sampler(text: str, source: Source, key: str) -> sampling.Sampler:
    sampler = sampling.build(text, source, key)
    if text != "permutation":
        processes.agree(lambda: {f"what {key} reads": sampler.digest[:12]},
                        fix="all processes must read the same files")  # fmt: skip
    return sampler


def extra_streams(config: ConfigDict) -> dict[str, ExtraStream]:
    """Parses the entries of `data.extra`, sorted by name; results do not depend on their order.

    A stream is a spec: `SOURCE/SPLIT`, or a split of `data.source`, followed by options joined by `|`. Raises UserError
    naming the key of an entry that no run can use.
    """
    return {name: _extra_stream(config, name) for name in sorted(config.data.extra)}


def _extra_stream(config: ConfigDict, name: str) -> ExtraStream:
    text, key = config.data.extra[name], f"data.extra.{name}"
    if name in _TAKEN or not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(f"{key}: the name must be a Python name other than {', '.join(_TAKEN)}, such as 'unlabeled'")
    head, *options = spec.split_calls(text)
    source, split = split_source(head)
    if source:
        spec.parse_one(source)
    elif not split:
        raise UserError(f"{key}={text!r} names no source; write \"folder('crops')/train\", or a split of data.source, "
                        "such as 'train[10%:]'")  # fmt: skip
    values = {"batch_size": config.batch_size, "preprocess": config.preprocess, "sampling": "permutation"}
    kinds = {name: type(value) for name, value in values.items()}
    for call in map(spec.parse_one, options):
        given = [type(value) for value in call.args]
        if call.kwargs or given != [kinds.get(call.name)] or (given == [int] and call.args[0] < 1):
            raise UserError(f"{key}={text!r}: {call} is no option; options are batch_size(256), "
                            "preprocess('decode(3)|resize(32)') and sampling('balanced')")  # fmt: skip
        values[call.name] = call.args[0]
    sampling.bind(values["sampling"])
    return ExtraStream(source, split, **values)


def split_source(text: str) -> tuple[str, str]:
    """The source and the split of "SOURCE/SPLIT"; either may be "", as in 'train[:10%]' and "folder('crops')"."""
    text = text.strip()
    if ")" not in text:
        return "", text
    if text.endswith(")"):
        return text, ""
    source, _, split = text.rpartition("/")
    return source.strip(), split.strip()

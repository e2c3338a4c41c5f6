"""Opens the data that a config names. It alone reads the keys `data.*` and `preprocess`; `data/` takes their values."""

import keyword
from collections.abc import Mapping
from dataclasses import dataclass

from ml_collections import ConfigDict

from imgclf_jax.core import processes, spec
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.data import decode, sampling, sources, splits
from imgclf_jax.data.source import Source
from imgclf_jax.data.stream import Images

# Keys of a batch or of the input of a loss, which no stream can have as its name.
_TAKEN = ("image", "label", "target", "id", "epoch", "step", "mask", "table", "other", "weight")


type Splits = Mapping[str, Source]  # by name, as a source spec opens them


@dataclass(frozen=True)
class ExtraStream:
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
    """Opens the training images of a config, with its `data.extra`; `base` are its sources, if open already."""
    base = open_data(config) if base is None else base
    extra = {name: _extra_images(config, name, stream, base) for name, stream in extra_streams(config).items()}
    return train_images(sources.take_split(base, config.data.train), config, extra)


def train_images(source: Source, config: ConfigDict, extra: Mapping[str, Images] | None = None) -> Images:
    """The images of a source with the host ops of training, in the order of `data.sampling`.

    All processes must call this; it raises UserError unless they sample by the same numbers.
    """
    sampler = _sampler(config.data.sampling, source, "data.sampling")
    return Images(source, config.preprocess, config.seed, config.data.threads, sampler, extra or {})


def eval_images(source: Source, config: ConfigDict) -> Images:
    """The images of a source with the host ops of evaluation."""
    preprocess = decode.evaluation_spec(config.preprocess_eval, config.preprocess)
    return Images(source, preprocess, config.seed, config.data.threads)


def _extra_images(config: ConfigDict, name: str, stream: ExtraStream, base: Mapping[str, Source]) -> Images:
    """Opens a stream of `data.extra`. Raises UserError naming its key."""
    key = f"data.extra.{name}"
    try:
        opened = open_data(config, stream.source) if stream.source else base
        source = sources.take_split(opened, stream.split or _default_split(opened))
        sampler = _sampler(stream.sampling, source, f"{key} sampling")
        return Images(source, stream.preprocess, config.seed, config.data.threads, sampler)
    except UserError as e:
        raise UserError(str(e) if str(e).startswith(key) else f"{key}: {e}") from e


def _default_split(base: Mapping[str, Source]) -> str:
    return "train" if len(base) > 1 else next(iter(base))


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
        why = "batches use this name for something else" if name in _TAKEN else "it must be a Python name"
        raise UserError(f"{key}: {why}; rename the stream, for example 'unlabeled'")
    head, *options = spec.split_calls(text)
    source, split = split_source(head)
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
    if not (source or split):
        raise UserError(f"{key}={text!r} names no source; write \"folder('crops')/train\", or a split of data.source, "
                        "such as 'train[10%:]'")  # fmt: skip
    if values["batch_size"] < 1:
        raise UserError(f"{key}={text!r}: batch_size must be 1 or more")
    if source:
        spec.parse_one(source)
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


def check_names(config: ConfigDict) -> None:
    """Raises UserError for values of `data.sampling` and `data.extra` that no run can use. Opens no data."""
    sampling.bind(config.data.sampling)
    extra_streams(config)


def describe_use(config: ConfigDict, base: Mapping[str, Source]) -> str:
    """Describes in one line the splits to train and evaluate on, with the sizes of those of these base splits."""
    sizes = {name: source.size for name, source in base.items()}

    def with_size(text: str) -> str:
        if ")" in text:  # of another source
            return text
        return f"{text} ({sum(part.stop - part.start for part in splits.resolve(text, sizes))})"

    evals = ", ".join(f"{name} = {with_size(text)}" for name, text in config.data.eval.items())
    return f"training on {with_size(config.data.train)}" + (f"; evaluating on {evals}" if evals else "")


def skipped_files(base: Mapping[str, Source], images: Images) -> list[str]:
    """The unreadable files that the sources of a run skip, sorted."""
    used = [*base.values(), *(stream.source for stream in images.extra.values())]
    return sorted({file for source in used for file in source.skipped_files})

"""Finds, downloads and prepares TFDS data sets as ArrayRecord, and opens them for random access."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imgclf_jax.core import cache, extras, json_files, paths, spec, tensorflow_import
from imgclf_jax.core.errors import UserError, no_such, unknown
from imgclf_jax.core.typing import Examples
from imgclf_jax.data.source import Source

_RETRIES = 6  # of a download, 12 s without a network; the 10 of TFDS take minutes

# Of TFDS, which is imported late.
type Builder = Any
type DataSource = Any


def open_tfds(name: str, data_dir: str, manual_dir: str) -> dict[str, Source]:
    """Opens the splits of a data set by `prepare_tfds`, or by a cached record if its files have not changed.

    The record avoids importing TFDS, which takes seconds: half of a short run on cached images.
    """
    identity = repr((name, str(paths.expand_user(data_dir)), _version(name)))
    record = cache.folder("tfds") / (hashlib.sha256(identity.encode()).hexdigest()[:32] + ".json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(paths.read(record))
        if known["info"] == _digest(paths.as_path(known["directory"])):
            return _sources(known, functools.cache(lambda: prepare_tfds(name, data_dir, manual_dir)[1]))

    builder, data_sources = prepare_tfds(name, data_dir, manual_dir)
    infos = {split: builder.info.splits[split] for split in data_sources}
    facts = {
        "directory": str(builder.data_path),
        "class_names": builder.info.features["label"].names,
        "splits": {split: (info.num_examples, f"{builder.info.full_name} {split} {info.num_examples} {info.num_bytes}")
                   for split, info in infos.items()},
        "info": "",
    }  # fmt: skip
    with contextlib.suppress(OSError):
        facts["info"] = _digest(paths.as_path(facts["directory"]))
        record.parent.mkdir(parents=True, exist_ok=True)
        json_files.write(record, facts)
    return _sources(facts, lambda: data_sources)


def _sources(facts: Mapping[str, Any], open_all: Callable[[], Mapping[str, DataSource]]) -> dict[str, Source]:
    class_names = tuple(facts["class_names"])
    return {split: _source(open_all, split, int(examples), str(identity), class_names, str(facts["info"]))
            for split, (examples, identity) in facts["splits"].items()}  # fmt: skip


def _source(
    open_all: Callable[[], Mapping[str, DataSource]], split: str, size: int, identity: str,
    class_names: tuple[str, ...], files_digest: str,
) -> Source:  # fmt: skip
    """A split prepared as ArrayRecord: encoded images, read by id. The first read may import TFDS."""
    data_source = functools.cache(lambda: open_all()[split])

    def read(ids: np.ndarray) -> Examples:
        records = data_source().__getitems__(ids.tolist())
        if isinstance(records[0], bytes):
            from tensorflow_datasets.proto import tf_example_pb2

            parsed = [tf_example_pb2.Example.FromString(r).features.feature for r in records]
            records = [
                {"image": p["image"].bytes_list.value[0], "label": p["label"].int64_list.value[0]} for p in parsed
            ]
        labels = np.array([r["label"] for r in records], np.int32)
        if labels.min() < 0:  # TFDS writes -1 for the secret labels of a test set
            raise UserError(f"example {int(ids[labels.argmin()])} of {identity!r} has no label; use another split")
        return {"image": [r["image"] for r in records], "label": labels}

    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return Source(size, read, class_names, fingerprint, thread_safe=True, cache_key=files_digest)


def _version(name: str) -> str:
    """The version of TFDS. Raises UserError if TFDS is not installed."""
    extras.require("tfds", f'data.source="tfds({name!r})"')
    return importlib.metadata.version("tensorflow-datasets")


def _digest(directory: Path) -> str:
    """The SHA-256 of the metadata in a prepared `directory`, and of its files' names, sizes and times."""
    digest = hashlib.sha256(paths.read(directory / "dataset_info.json"))
    for file in sorted(directory.iterdir()):
        stat: Any = file.stat()
        digest.update(f"{file.name} {paths.size(file)} {getattr(stat, 'st_mtime_ns', None) or stat.mtime}".encode())
    return digest.hexdigest()


def metadata(name: str, data_dir: str) -> tuple[dict[str, int], int, tuple[int | None, ...]]:
    """Returns ({split: examples}, classes, image shape) of a TFDS data set without preparing or downloading it.

    The splits are empty if the data are not prepared; unknown sizes in the shape are None. Raises like `prepare_tfds`.
    """
    builder = _builder(name, data_dir)
    splits = builder.info.splits if builder.data_path.exists() else {}
    features = builder.info.features
    return {k: v.num_examples for k, v in splits.items()}, features["label"].num_classes, features["image"].shape


def prepare_tfds(name: str, data_dir: str, manual_dir: str) -> tuple[Builder, dict[str, DataSource]]:
    """Returns (builder, {split: data source of encoded images}) of a TFDS data set, downloaded at first use.

    Raises UserError for an unknown name, a data set without image and label, an unreachable network (naming the files
    to bring into `manual_dir`), and a `data_dir` that is not writable.
    """
    builder = _builder(name, data_dir)
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import download as downloads
    from tensorflow_datasets.core.download import downloader

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    missing: list[str] = []
    if not builder.data_path.exists():
        missing = _missing_files(builder, manual_dir)
        tensorflow_import.tensorflow().result()  # only preparing needs it; reading does not
    downloader.MAX_RETRIES = _RETRIES
    config = tfds.download.DownloadConfig(manual_dir=manual_dir or None)
    try:
        builder.download_and_prepare(download_config=config)
    except (OSError, downloads.download_manager.NonMatchingChecksumError, downloads.util.DownloadError) as e:
        where = f"data_dir {data_dir or '~/tensorflow_datasets'}, manual_dir {manual_dir or 'not set'}"
        fetch = f"; without a network, fetch these files elsewhere, put them in one directory and pass it as "\
                f"--config.data.manual_dir: {', '.join(missing)}" if missing else ""  # fmt: skip
        raise UserError(f"TFDS could not prepare {name!r} ({where}): {str(e).splitlines()[0]}{fetch}") from e
    except AssertionError as e:  # a data set that must be downloaded by hand
        raise UserError(f"TFDS data set {name!r}: {' '.join(str(e).split())}; set --config.data.manual_dir") from e
    if isinstance(builder.info.features["image"], tfds.features.Image):  # TFDS takes three times as long to parse it
        return builder, builder.as_data_source(deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    return builder, builder.as_data_source(decoders={"image": tfds.decode.SkipDecoding()})


def _builder(name: str, data_dir: str) -> Builder:
    """The TFDS builder of a data set with image and label."""
    paths.expand_user(data_dir)  # refuses other addresses, which TFDS would read
    _version(name)
    tensorflow_import.wait_if_begun()
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as e:
        known = tfds.list_builders(with_community_datasets=False)
        message = unknown("TFDS data set", name.partition(":")[0].partition("/")[0], known)
        raise UserError(message.split("allowed:")[0] + "see tensorflow.org/datasets/catalog") from e
    except (AssertionError, ValueError, ImportError) as e:
        hint = "; pass another --config.data.data_dir" if "File format is already set" in str(e) else ""
        raise UserError(f"TFDS data set {name!r}: {str(e).splitlines()[0]}{hint}") from e
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise UserError(f"TFDS data set {name!r} has {sorted(features)}; image classification needs image and label")
    if not isinstance(features["label"], tfds.features.ClassLabel):
        raise UserError(f"TFDS data set {name!r}: its label is {features['label']!r}, expected a ClassLabel")
    return builder


def _missing_files(builder: Builder, manual_dir: str) -> list[str]:
    """The addresses of the files to download, as far as TFDS has recorded them.

    Raises UserError if the program may not download (see `spec.check_trusted`).
    """
    if manual_dir and not Path(manual_dir).is_dir():
        raise no_such("data.manual_dir", "directory", manual_dir)
    # {address: name in manual_dir}; empty for a data set whose files TFDS has not recorded
    files = {url: info.filename or url.rpartition("/")[2] for url, info in (builder.url_infos or {}).items()}
    missing = {url: name for url, name in files.items() if not (manual_dir and Path(manual_dir, name).exists())}
    if missing or not files:
        what = f"TFDS data set {builder.name!r}, which is not prepared on this machine and would be downloaded"
        spec.check_trusted(what)
    return [url if url.endswith(name) else f"{url} (as {name})" for url, name in missing.items()]

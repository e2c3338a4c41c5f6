"""Finds, downloads and prepares TFDS data sets as ArrayRecord, and opens them for random access."""

import functools
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from imgclf_jax.core import extras, paths, spec, tensorflow_import
from imgclf_jax.core.errors import UserError, no_such, unknown
from imgclf_jax.core.typing import Examples
from imgclf_jax.data.source import Source

_RETRIES = 6  # of a download, 12 s without a network; the 10 of TFDS take minutes

type Builder = Any  # of TFDS, which is imported late


def tfds(name: str, data_dir: str = "", manual_dir: str = "") -> dict[str, Source]:
    """A TFDS data set by name ('mnist', 'imagenet2012:5.1.0'), prepared as ArrayRecord at first use: encoded images.

    `manual_dir` holds manually downloaded archives, for machines without a network. Raises UserError for an unknown
    name, a data set without image and label, an unreachable network (with files to bring), or a read-only `data_dir`.
    """
    if re.search(r":(?!\d)", name):  # not a version, as in imagenet2012:5.1.0
        spec.check_trusted(f"data set {name!r}, for which TFDS would fetch a program and run it")
    builder = _builder(name, data_dir)
    _prepare(builder, name, data_dir, manual_dir)
    from tensorflow_datasets import decode

    class_names = tuple(builder.info.features["label"].names)
    out = {}
    for split, data_source in builder.as_data_source(decoders={"image": decode.SkipDecoding()}).items():
        info = builder.info.splits[split]
        identity = f"{builder.info.full_name} {split} {info.num_examples} {info.num_bytes}"
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        read = functools.partial(_read, data_source, identity)
        out[split] = Source(info.num_examples, read, class_names, fingerprint)
    return out


def _read(data_source: Any, identity: str, ids: np.ndarray) -> Examples:
    records = data_source.__getitems__(ids.tolist())
    labels = np.array([r["label"] for r in records], np.int32)
    if labels.min() < 0:  # TFDS writes -1 for the secret labels of a test set
        raise UserError(f"example {int(ids[labels.argmin()])} of {identity!r} has no label; use another split")
    return {"image": [r["image"] for r in records], "label": labels}


def metadata(name: str, data_dir: str) -> tuple[dict[str, int], int, tuple[int | None, ...]]:
    """Returns ({split: examples}, classes, image shape) of a TFDS data set without preparing or downloading it.

    The splits are empty if the data are not prepared; unknown sizes in the shape are None. Raises as `tfds` does.
    """
    builder = _builder(name, data_dir)
    splits = builder.info.splits if builder.data_path.exists() else {}
    features = builder.info.features
    return {k: v.num_examples for k, v in splits.items()}, features["label"].num_classes, features["image"].shape


def _prepare(builder: Builder, name: str, data_dir: str, manual_dir: str) -> None:
    """Downloads and prepares a data set, unless it is prepared already. Raises UserError: see `tfds`."""
    if builder.data_path.exists():
        return
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import download as downloads
    from tensorflow_datasets.core.download import downloader

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
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


def _builder(name: str, data_dir: str) -> Builder:
    """The TFDS builder of a data set with image and label."""
    paths.as_path(data_dir)  # refuses other addresses, which TFDS would read
    extras.require("tfds", f'data.source="tfds({name!r})"')
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
    """The addresses of the files to download that TFDS has recorded. Raises UserError if the config is not trusted."""
    if manual_dir and not Path(manual_dir).is_dir():
        raise no_such("data.manual_dir", "directory", manual_dir)
    # {address: name in manual_dir}; empty for a data set whose files TFDS has not recorded
    files = {url: info.filename or url.rpartition("/")[2] for url, info in (builder.url_infos or {}).items()}
    missing = {url: name for url, name in files.items() if not (manual_dir and Path(manual_dir, name).exists())}
    if missing or not files:
        what = f"TFDS data set {builder.name!r}, which is not prepared on this machine and would be downloaded"
        spec.check_trusted(what)
    return [url if url.endswith(name) else f"{url} (as {name})" for url, name in missing.items()]

"""TFDS: finds or downloads a data set, prepares it as ArrayRecord, opens it for random access."""

import os
import socket
import sys
import urllib.parse
from pathlib import Path
from typing import Any

from imgclf_jax import lazy
from imgclf_jax.errors import UserError, unknown


def prepare_tfds(name: str, data_dir: str, manual_dir: str) -> tuple[Any, dict[str, Any]]:
    """(builder, {split: data source whose images stay encoded}) of a TFDS data set, downloaded at first use.

    Raises UserError for an unknown name, a data set that does not hold an image and a label, an unreachable
    network (naming the files to bring into `manual_dir`) and a `data_dir` that cannot be written.
    """
    lazy.tensorflow().result()
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import download as downloads

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as e:
        known = [n for n in tfds.list_builders() if ":" not in n]
        message = unknown("TFDS data set", name.partition(":")[0].partition("/")[0], known)
        raise UserError(message.split("allowed:")[0] + "see tensorflow.org/datasets/catalog") from e
    except (AssertionError, ValueError, ImportError) as e:
        mend = "; pass another --config.data.data_dir" if "File format is already set" in str(e) else ""
        raise UserError(f"TFDS data set {name!r}: {str(e).splitlines()[0]}{mend}") from e
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise UserError(f"TFDS data set {name!r} holds {sorted(features)}; image classification needs image and label")
    if not isinstance(features["label"], tfds.features.ClassLabel):
        raise UserError(f"TFDS data set {name!r}: its label is {features['label']!r}, expected a ClassLabel")
    if not builder.data_path.exists():
        _check_files(builder, manual_dir)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir or None)
    try:
        builder.download_and_prepare(download_config=config)
    except (OSError, downloads.download_manager.NonMatchingChecksumError, downloads.util.DownloadError) as e:
        where = f"data_dir {data_dir or '~/tensorflow_datasets'}, manual_dir {manual_dir or 'not set'}"
        raise UserError(f"TFDS could not prepare {name!r} ({where}): {str(e).splitlines()[0]}") from e
    except AssertionError as e:  # a data set that can only be had by hand
        raise UserError(f"TFDS data set {name!r}: {' '.join(str(e).split())}; set --config.data.manual_dir") from e
    sources = builder.as_data_source(decoders={"image": tfds.decode.SkipDecoding()})
    return builder, sources


def _check_files(builder: Any, manual_dir: str) -> None:
    """Raises UserError at once where TFDS would retry for minutes: files not at hand, and no network to fetch them."""
    if manual_dir and not Path(manual_dir).is_dir():
        raise UserError(f"data.manual_dir: there is no directory {manual_dir!r} (working directory: {Path.cwd()})")
    # {address: name in manual_dir}; empty for a data set that TFDS has recorded no files of
    files = {url: info.filename or url.rpartition("/")[2] for url, info in (builder.url_infos or {}).items()}
    missing = [url for url, name in files.items() if not (manual_dir and Path(manual_dir, name).exists())]
    if len(builder.builder_configs) > 1 and len(missing) < len(files):
        return  # the files of all configs are recorded together, and which are of this one is not known
    proxied = any(os.environ.get(v) for v in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"))
    addresses = [urllib.parse.urlparse(url) for url in missing]
    for host in sorted({a.hostname or "" for a in addresses if a.scheme in ("http", "https", "ftp")}):
        try:
            if host and not proxied:
                socket.getaddrinfo(host, 80)
        except OSError as e:
            raise UserError(
                f"no network for TFDS data set {builder.name!r} ({host}: {e.strerror}); fetch these files elsewhere, "
                "put them in one directory and pass it as --config.data.manual_dir: "
                + ", ".join(url if url.endswith(files[url]) else f"{url} (as {files[url]})" for url in missing)
            ) from e

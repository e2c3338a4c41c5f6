"""Internals of other libraries that have no public name. Nothing else in the package imports private modules.

`tests/core/test_internals.py` fails when a new version of a library changes one of these.
"""

import functools
import os
from contextlib import AbstractContextManager
from typing import Any


def coordination_state() -> Any:
    """JAX's connection to its coordination service: `client` (a key-value store), `num_processes` and `process_id`.

    `jax.distributed` exports only `initialize` and `shutdown`, and `multihost_utils` talks through device collectives,
    which need a running backend and wait without a timeout. Orbax takes the client from the same place.
    """
    from jax._src import distributed

    return distributed.global_state


def not_cached() -> AbstractContextManager[None]:
    """Inside, this thread's compilations are not written to JAX's persistent compilation cache.

    Serializing a program with oneDNN's convolutions crashes jaxlib 0.12. JAX's public setting is global: other threads
    would lose the cache too, or turn it back on in between.
    """
    from jax._src import config

    context: AbstractContextManager[None] = config.persistent_cache_min_compile_time_secs(float("inf"))
    return context


@functools.cache
def teach_orbax_s3() -> None:
    """Makes Orbax write arrays to `s3://`, as it does to `gs://`. It would write them to a local folder named `s3:`.

    TensorStore has an S3 driver, but Orbax has no option to choose the driver.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    is_gs, gs_spec = tensorstore_utils._use_gcs_driver, gcs_utils.get_kvstore_for_gcs
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith("s3:/") or is_gs(path)
    gcs_utils.get_kvstore_for_gcs = lambda path: _s3_spec(path) if path.startswith("s3:/") else gs_spec(path)


def _s3_spec(path: str) -> dict[str, str]:
    """TensorStore's spec of `s3:/BUCKET/NAME` (Orbax normalizes the slashes), at AWS_ENDPOINT_URL if that is set."""
    bucket, _, name = path.removeprefix("s3:").lstrip("/").partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return {"driver": "s3", "bucket": bucket, "path": name, **({"endpoint": endpoint} if endpoint else {})}

"""The internals of other libraries that `core.internals` relies on still exist."""

import inspect
import os
import threading
from pathlib import Path

import jax

from imgclf_jax.core import internals


def test_jax_has_its_coordination_state():
    state = internals.coordination_state()
    assert (state.client, state.process_id, state.num_processes) == (None, 0, 1)  # of a process on its own
    assert state.preemption_sync_manager is None
    assert callable(state.initialize_preemption_sync_manager)


def test_orbax_chooses_tensorstore_s_driver_by_these_functions(monkeypatch):
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    names = [(tensorstore_utils, "_use_gcs_driver"), (gcs_utils, "get_kvstore_for_gcs")]
    for module, name in names:
        monkeypatch.setattr(module, name, getattr(module, name))  # restores them afterwards
        assert len(inspect.signature(getattr(module, name)).parameters) == 1
    internals.teach_orbax_s3.__wrapped__()
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://here")
    for folder, base in (
        ("s3://b/run/1/default", {"driver": "s3", "bucket": "b", "path": "run/1/default", "endpoint": "http://here"}),
        ("gs://b/run", {"driver": "gcs", "bucket": "b", "path": "run"}),
        ("/run", None),
    ):
        spec = tensorstore_utils.build_kvstore_tspec(folder, "kernel")
        assert (spec["driver"], spec["path"]) == ("ocdbt", "kernel")
        if base:
            assert spec["base"] == base
        else:
            assert spec["base"]["driver"] == "file"
    file = tensorstore_utils.build_kvstore_tspec("s3://b/run", "_sharding", use_ocdbt=False)
    assert file["path"] == "run/_sharding"  # and not a folder


def test_what_a_thread_compiles_inside_not_cached_is_not_cached():
    """Nor changed for other threads. In the cache it would crash this process: see `not_cached`."""
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])

    def entries():
        return {path.name for path in folder.glob("*secret_name*")}

    def compile(number):
        def secret_name(x):
            return x * number

        jax.jit(secret_name).lower(1.0).compile()

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        with internals.not_cached():
            compile(os.getpid())
            assert not entries()
            other = threading.Thread(target=compile, args=(os.getpid() + 1,))
            other.start()
            other.join()
            assert (others := entries())
        compile(os.getpid() + 2)
        assert entries() > others
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

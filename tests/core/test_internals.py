"""The internals of other libraries that `core.internals` relies on still exist."""

import inspect

from imgclf_jax.core import internals


def test_jax_has_its_coordination_state():
    state = internals.coordination_state()
    assert (state.client, state.process_id, state.num_processes) == (None, 0, 1)  # of a process on its own


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

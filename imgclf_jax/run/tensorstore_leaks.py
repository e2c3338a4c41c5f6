"""What TensorStore 0.1.86 gives as JSON is never freed, and Orbax asks for some of it at every save.

Two functions of Orbax are replaced by ones that ask less. They and a third one also learn of S3, which Orbax does not
know and TensorStore does. `stop` is called once, when `checkpoint` is imported.
"""

import copy
import functools
from typing import Any

from orbax.checkpoint._src.serialization import tensorstore_utils

from imgclf_jax.core import places

_MADE_UP = "/imgclf_jax-made-up-folder"


def stop() -> None:
    """A save no longer loses memory: it was some 20 kB, and 270 bytes more for each array."""
    # TensorStore's metrics, which Orbax logs to say how well arrays are compressed.
    tensorstore_utils.get_tensorstore_raw_bytes = lambda *_: 0
    tensorstore_utils._build_non_ocdbt_kvstore_tspec = _also_s3(tensorstore_utils._build_non_ocdbt_kvstore_tspec)
    tensorstore_utils._build_ocdbt_kvstore_tspec = _once_a_folder(tensorstore_utils._build_ocdbt_kvstore_tspec)


def _once_a_folder(build: Any) -> Any:
    """`build` gives where an array is written. It asks TensorStore for a part of that, which is the same in any folder.

    So it is asked for a made-up folder once, whose name is then replaced; folders at gs:// are asked for each time.
    """
    kept = functools.lru_cache(8)(build)

    @functools.wraps(build)
    def place(directory: Any, name: str | None = None, **settings: Any) -> dict[str, Any]:
        where = str(directory).rstrip("/")
        if where.startswith(("/", "s3://")):
            spec: dict[str, Any] = _in_folder(kept(_MADE_UP, **settings), where)
            spec = _in_s3(spec) if where.startswith("s3://") else spec
        else:
            spec = copy.deepcopy(kept(directory, **settings))
        return spec if name is None else {**spec, "path": name}

    return place


def _also_s3(build: Any) -> Any:
    """`build` gives where a file is written. One in an S3 bucket it would write into a folder `s3:` of this disk."""

    @functools.wraps(build)
    def place(directory: Any, name: str | None = None) -> dict[str, Any]:
        if not str(directory).startswith("s3://"):
            return dict(build(directory, name))
        spec = places.store(str(directory).rstrip("/"))
        return {**spec, "path": spec["path"] + name} if name else spec

    return place


def _in_s3(spec: Any) -> Any:
    """The same place in a bucket, where `spec` has a file."""
    if not isinstance(spec, dict):
        return spec
    if spec.get("driver") == "file":
        return places.store(spec["path"].rstrip("/"))
    return {key: _in_s3(value) for key, value in spec.items()}


def _in_folder(spec: Any, folder: str) -> Any:
    if isinstance(spec, dict):
        return {key: _in_folder(value, folder) for key, value in spec.items()}
    return spec.replace(_MADE_UP, folder) if isinstance(spec, str) else spec

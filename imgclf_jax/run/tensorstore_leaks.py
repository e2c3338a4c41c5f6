"""What TensorStore 0.1.86 gives as JSON is never freed, and Orbax asks for some of it at every save.

Both functions of Orbax are replaced by ones that ask less: `stop` is called once, when `checkpoint` is imported.
"""

import copy
import functools
from typing import Any

from orbax.checkpoint._src.serialization import tensorstore_utils


def stop() -> None:
    """A save no longer loses memory: it was some 20 kB, and 270 bytes more for each array."""
    # TensorStore's metrics, which Orbax logs to say how well arrays are compressed.
    tensorstore_utils.get_tensorstore_raw_bytes = lambda *_: 0
    tensorstore_utils._build_ocdbt_kvstore_tspec = _once_a_folder(tensorstore_utils._build_ocdbt_kvstore_tspec)


def _once_a_folder(build: Any) -> Any:
    """`build` gives where an array is written. It asks TensorStore for its part of that, the same for each array."""
    kept = functools.lru_cache(8)(build)

    def place(directory: Any, name: str | None = None, **settings: Any) -> dict[str, Any]:
        spec: dict[str, Any] = copy.deepcopy(kept(directory, **settings))
        return spec if name is None else {**spec, "path": name}

    return place

"""Imports TensorFlow in a thread. The import takes seconds, during which training can begin."""

import concurrent.futures
import functools
from types import ModuleType


@functools.cache
def tensorflow() -> concurrent.futures.Future[ModuleType | None]:
    """A future of the module, or of None if it is not installed. The first call starts the import.

    Code that needs TensorFlow waits for it: two threads that import it at once can see a half-initialized module.
    """

    def load() -> ModuleType | None:
        try:
            import tensorflow
        except ImportError:
            return None
        return tensorflow

    return concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="import-tensorflow").submit(load)


def wait_if_begun() -> None:
    """Waits for the import if `tensorflow` has begun it, for code that may import TensorFlow itself."""
    if tensorflow.cache_info().currsize:
        tensorflow().result()

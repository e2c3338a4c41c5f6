"""TensorFlow, imported in a thread: it takes seconds, in which training can begin."""

import concurrent.futures
import functools
from types import ModuleType


@functools.cache
def tensorflow() -> concurrent.futures.Future[ModuleType | None]:
    """The module, or None where it is not installed; the first call begins the import.

    All that needs TensorFlow, or a library that imports it, waits for this first: two threads that import it at once
    can see halves of it.
    """

    def load() -> ModuleType | None:
        try:
            import tensorflow
        except ImportError:
            return None
        return tensorflow

    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="import-tensorflow")
    future = pool.submit(load)
    pool.shutdown(wait=False)
    return future

"""A cached property that is computed once, whatever threads ask for it."""

import functools
import threading
from collections.abc import Callable
from typing import Any


class once[T](functools.cached_property[T]):
    """`functools.cached_property` with a lock: while one thread computes the value, the others wait for it.

    The lock is shared by all instances of a class. An exception is raised to who asked, and the next one tries again.
    """

    def __init__(self, function: Callable[[Any], T]):
        super().__init__(function)
        self._lock = threading.RLock()

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        with self._lock:
            return super().__get__(instance, owner)

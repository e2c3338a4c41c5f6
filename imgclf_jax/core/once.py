"""A cached property that is computed once, whatever threads ask for it."""

import functools
import threading
from collections.abc import Callable
from typing import Any


class once[T](functools.cached_property[T]):
    """`functools.cached_property` with a lock: while one thread computes the value, the others wait for it.

    All instances of a class share the lock. If the function raises, the next access calls it again.
    """

    def __init__(self, function: Callable[[Any], T]):
        super().__init__(function)
        self._lock = threading.RLock()

    def __get__(self, instance: object, owner: type | None = None) -> T:  # type: ignore[override]
        with self._lock:
            return super().__get__(instance, owner)

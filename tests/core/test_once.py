"""A property that several threads request at the same time is computed once."""

import threading
import time

import pytest

from imgclf_jax.core.once import once


class Slow:
    """Counts how often its property is computed."""

    def __init__(self, failures=0):
        self.computed, self.failures = 0, failures

    @once
    def value(self):
        """Returns a new object, after a pause."""
        self.computed += 1
        time.sleep(0.1)
        if self.computed <= self.failures:
            raise ValueError("not yet")
        return object()


def test_threads_get_the_same_object():
    slow, found = Slow(), []
    threads = [threading.Thread(target=lambda: found.append(slow.value)) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert slow.computed == 1
    assert len(set(map(id, found))) == 1
    assert Slow().value is not slow.value
    assert Slow.value.__doc__ == "Returns a new object, after a pause."


def test_after_a_failure_it_is_computed_again():
    slow = Slow(failures=1)
    with pytest.raises(ValueError, match="not yet"):
        _ = slow.value
    assert slow.value is slow.value
    assert slow.computed == 2

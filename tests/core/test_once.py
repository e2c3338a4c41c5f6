"""A property that several threads request at the same time is computed once."""

import threading
import time

import pytest

from imgclf_jax.core.once import once


class Slow:
    """Computes its property slowly, in vain at first."""

    def __init__(self):
        self.computed = 0

    @once
    def value(self):
        """Returns a new object, after a pause."""
        self.computed += 1
        time.sleep(0.1)
        if self.computed == 1:
            raise ValueError("not yet")
        return object()


def test_threads_get_the_same_object():
    slow, found = Slow(), []
    with pytest.raises(ValueError, match="not yet"):
        _ = slow.value
    threads = [threading.Thread(target=lambda: found.append(slow.value)) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert slow.computed == 2
    assert found == [slow.value] * 4

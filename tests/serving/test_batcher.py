"""Batches of images that come one by one."""

import os
import threading

import numpy as np
from test_app import model, png  # noqa: F401  the former is a fixture

from imgclf_jax.core.errors import UserError
from imgclf_jax.serving import batcher


def test_large_files_are_decoded_by_several_threads(model, monkeypatch):  # noqa: F811
    """Each has its own result, and one that does not decode spoils no other; small files take one thread."""
    images = [png(seed) for seed in range(7)]
    images[4] = b"garbage"
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    made, seen = batcher.Batcher(model), []
    prepare, both = type(model).prepare, threading.Barrier(2, timeout=20)

    def noted(self, image, place=0):
        if threading.current_thread() not in seen:
            seen.append(threading.current_thread())
            if len(seen) <= 2 and several:
                both.wait()  # until another thread decodes at the same time
        return prepare(self, image, place)

    monkeypatch.setattr(type(model), "prepare", noted)
    several = False
    alone = made._classify(images)
    assert seen == [threading.current_thread()]
    seen.clear()
    several = True
    monkeypatch.setattr(batcher, "_BYTES_A_THREAD", 1)
    together = made._classify(images)
    assert len(seen) in (2, 3)
    for i, (a, b) in enumerate(zip(alone, together, strict=True)):
        assert isinstance(a, UserError) == isinstance(b, UserError) == (i == 4)
        if i != 4:
            np.testing.assert_array_equal(a, b)

"""Batches of images that come one by one."""

import asyncio
import os
import sys
import threading
import time

import numpy as np
import pytest
from test_app import model, png  # noqa: F401  the former is a fixture

from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.serve import batcher


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


def test_small_images_do_not_wait_for_large_ones(model, monkeypatch):  # noqa: F811
    """More of them than there are threads; each is decoded once it is let, and none whose client has gone."""
    prepare, go, begun = type(model).prepare, threading.Event(), []

    def slow(self, image, place=0):
        if image.startswith(b"large"):
            image = image.rstrip(b"\0")
            begun.append(image)
            assert go.wait(20)
            image = png(int(image[5:]))
        return prepare(self, image, place)

    monkeypatch.setattr(type(model), "prepare", slow)
    made = batcher.Batcher(model)

    async def clients():
        running = asyncio.create_task(made.run())
        large = [asyncio.create_task(made.predict(b"large%d" % n + bytes(5_000_000))) for n in range(6)]
        async with asyncio.timeout(20):
            small = await asyncio.gather(*(made.predict(png(n)) for n in range(10)))
        while not begun:
            await asyncio.sleep(0.01)
        gone = next(n for n in range(6) if b"large%d" % n not in begun)
        large.pop(gone).cancel()
        await asyncio.sleep(0.05)
        assert len(begun) == 1
        go.set()
        async with asyncio.timeout(20):
            rows = await asyncio.gather(*large)
        running.cancel()
        assert b"large%d" % gone not in begun
        return small, rows, [n for n in range(6) if n != gone]

    small, rows, answered = asyncio.run(clients())
    np.testing.assert_allclose(np.array(small)[:, 0], model.predict([png(n) for n in range(10)]), atol=1e-5)
    np.testing.assert_allclose(np.array(rows)[:, 0], model.predict([png(n) for n in answered]), atol=1e-5)


def test_images_of_one_client_that_take_long_do_not_keep_another_waiting(model, monkeypatch):  # noqa: F811
    """Files of a few kilobytes and a million pixels, 64 a request, kept everybody waiting for 11 seconds."""
    prepare = type(model).prepare

    def slow(self, image, place=0):
        if image.startswith(b"slow"):
            time.sleep(0.01)
            image = png(int(image[4:]))
        return prepare(self, image, place)

    monkeypatch.setattr(type(model), "prepare", slow)
    monkeypatch.setattr(batcher, "_SECONDS", 0.05)
    made = batcher.Batcher(model)

    async def clients():
        running = asyncio.create_task(made.run())
        many = [asyncio.create_task(made.predict(b"slow%d" % n, "a")) for n in range(150)]
        await asyncio.sleep(0.01)
        async with asyncio.timeout(20):
            row = await made.predict(png(0), "b")
            before = sum(task.done() for task in many)
            rows = await asyncio.gather(*many)
        running.cancel()
        return before, [row, *rows]

    before, rows = asyncio.run(clients())
    assert before < 40
    np.testing.assert_allclose(np.array(rows)[:, 0], model.predict([png(n) for n in (0, *range(150))]), atol=1e-5)


def test_small_images_are_explained_beside_large_ones(model):  # noqa: F811
    """And a large one whose client has gone before its turn is not explained."""
    made, go, begun = batcher.Batcher(model), threading.Event(), []

    def explain(image):
        if image.startswith(b"large"):
            image = image.rstrip(b"\0")
            begun.append(image)
            assert go.wait(20)
        return image

    async def clients():
        large = [asyncio.create_task(made.alone("a", explain, b"large%d" % n + bytes(5_000_000))) for n in range(3)]
        async with asyncio.timeout(20):
            while not begun:
                await asyncio.sleep(0.01)
            assert await made.alone("b", explain, b"small") == b"small"
            large[1].cancel()
            await asyncio.sleep(0)
            go.set()
            assert [await large[0], await large[2]] == [b"large0", b"large2"]

    asyncio.run(clients())
    assert begun == [b"large0", b"large2"]


def test_clients_take_turns():
    """One that asks often does not keep another waiting, nor does one that goes when its turn comes."""
    turns, go, done = batcher.Turns("turns"), threading.Event(), []

    def work(name):
        assert go.wait(20)
        done.append(name)

    async def clients():
        tasks = {name: asyncio.create_task(turns.call(name[0], work, name)) for name in ("a0", "a1", "a2", "a3", "b0")}
        await asyncio.sleep(0.01)
        tasks.pop("a2").cancel()
        asyncio.get_running_loop().call_later(0.01, go.set)
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks.values())
            gone = asyncio.create_task(turns.call("a", work, "gone"))
            turns._free = 0
            await asyncio.sleep(0)
            turns._pass_on()
            gone.cancel()
            await turns.call("b", work, "last")

    asyncio.run(clients())
    turns.pool.shutdown()
    assert done == ["a0", "a1", "b0", "a3", "last"]


def test_closing_does_not_wait_for_a_thread_for_ever(model):  # noqa: F811
    made, go, other = batcher.Batcher(model), threading.Event(), batcher.Batcher(model)
    assert other.close(20)
    made._largest.pool.submit(go.wait)
    assert not made.close(0.1)
    go.set()
    assert made.close(20)


def test_an_error_does_not_keep_its_image(model):  # noqa: F811
    """Nor what decoding it took, which its traceback would; a thousand of them would fill the memory."""
    [error] = batcher.Batcher(model)._classify([png(0)[:50]])
    assert "does not decode" in str(error)
    assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_the_threads_of_costly_images_yield_the_cpu(model):  # noqa: F811

    def priority(image=b""):
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    made = batcher.Batcher(model)

    async def priorities():
        return [await turns.call("", priority) for turns in (made._apart, made._largest, made._small)]

    own = priority()
    assert asyncio.run(priorities()) == [min(19, own + 5)] * 2 + [own]
    assert priority() == own

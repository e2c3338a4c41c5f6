"""Batches of images that come one by one."""

import asyncio

import numpy as np
import pytest
from fastapi import HTTPException
from test_app import model, png  # noqa: F401  the former is a fixture

from imgclf_jax.tools.serve import batcher


def test_images_that_wait_share_a_batch(model):  # noqa: F811
    """Each has its own result; one whose client has gone, or whose batch fails, holds up no other."""
    made, sizes, compute = batcher.Batcher(model), [], batcher.Batcher._compute
    images = [model.prepare(png(seed)) for seed in range(70)]

    def noted(images):
        sizes.append(len(images))
        if len(sizes) == 1:
            raise RuntimeError("once")
        return compute(made, images)

    made._compute = noted

    async def clients():
        tasks = [asyncio.create_task(made.predict(image)) for image in images]
        await asyncio.sleep(0)
        tasks[-1].cancel()
        running = asyncio.create_task(made.run())
        rows = await asyncio.gather(*tasks, return_exceptions=True)
        rows[:64] = await asyncio.gather(*map(made.predict, images[:64]))
        running.cancel()
        return rows[:-1]

    rows = asyncio.run(clients())
    assert sizes == [64, 6, 64]
    np.testing.assert_allclose(np.array(rows)[:, 0], model.predict([png(n) for n in range(69)]), atol=1e-5)


def test_too_many_images_are_refused(model):  # noqa: F811
    async def clients():
        made = batcher.Batcher(model)
        tasks = [asyncio.create_task(made.predict(np.zeros(1))) for _ in range(batcher._MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(HTTPException, match="503"):
            await made.predict(np.zeros(1))
        for task in tasks:
            task.cancel()

    asyncio.run(clients())

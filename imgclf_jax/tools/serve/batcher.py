"""Dynamic batching: the images that arrive while a batch is computed form the next one."""

import asyncio

import numpy as np
from fastapi import HTTPException

from imgclf_jax.core import sharding
from imgclf_jax.trained import Trained

_SIZES = 1, 8, 64  # images in a batch; each size is a compiled program
_MAX_WAITING = 512  # images


class Batcher:
    """Computes the outputs of prepared images, padded to one of a few batch sizes. For use from one event loop."""

    def __init__(self, model: Trained) -> None:
        self._model, self._shape = model, model.programs.recipe.data.image_shape
        self._sizes = sorted({sharding.round_up(size, model.programs.mesh) for size in _SIZES})
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = asyncio.Queue(_MAX_WAITING)
        for size in self._sizes:
            self._compute([np.zeros(self._shape, np.uint8)] * size)

    async def predict(self, image: np.ndarray) -> np.ndarray:
        """Returns the outputs "ranked", f32[2, classes], of an image uint8[h, w, c] from `Trained.prepare`.

        Raises HTTPException 503 if too many images wait.
        """
        result: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((image, result))
        except asyncio.QueueFull:
            raise HTTPException(503, "too many images wait; try again in a second") from None
        return await result

    async def run(self) -> None:
        """Computes waiting images, batch by batch, until cancelled."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._sizes[-1] and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            try:
                rows = await asyncio.to_thread(self._compute, [image for image, _ in batch])
            except Exception as e:
                for _, result in batch:
                    if not result.cancelled():
                        result.set_exception(e)
            else:
                for (_, result), row in zip(batch, rows, strict=True):
                    if not result.cancelled():
                        result.set_result(row)

    def _compute(self, images: list[np.ndarray]) -> np.ndarray:
        size = next(size for size in self._sizes if size >= len(images))
        batch = np.zeros((size, *self._shape), np.uint8)
        batch[: len(images)] = images
        # Passing the NumPy batch to the program takes a third of the time of `sharding.put_batch`.
        out = np.asarray(self._model.programs.inference("ranked")(*self._model.state.evaluated, batch))
        return out.swapaxes(0, 1)[: len(images)]  # [n, 2, classes]

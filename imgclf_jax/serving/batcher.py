"""Images of many requests in one batch on the device."""

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any

import numpy as np

from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.trained import Trained


class Busy(Exception):
    """So many images wait already that one more would not be answered in time."""


class Batcher:
    """Classifies images that come one by one. While the device has a batch, those that come make the next one.

    So nothing waits for a batch to fill, and under load batches fill by themselves. A batch has one of a few sizes,
    each of which is compiled when the batcher is made, and is padded to it. Used from one event loop.
    """

    def __init__(self, model: Trained, largest: int = 64, most_waiting: int = 512, seen: Callable[[int], Any] = int):
        """`seen` is called with the number of images of each batch."""
        self._model, self._seen, self._most_waiting = model, seen, most_waiting
        mesh = model.programs.mesh
        self._sizes = sorted({sharding.round_up(size, mesh) for size in (1, 8, largest)})
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = asyncio.Queue()
        self._device = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="device")
        for size in self._sizes:
            self._compute([np.zeros(model.programs.recipe.data.image_shape, np.uint8)] * size)

    @property
    def waiting(self) -> int:
        """How many images wait for a batch."""
        return self._waiting.qsize()

    async def predict(self, image: np.ndarray) -> np.ndarray:
        """The probabilities f32[classes] of an image uint8[h, w, c], as the model takes it.

        Raises Busy if too many images wait, and UserError if the model gives NaN.
        """
        if self.waiting >= self._most_waiting:
            raise Busy
        result: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((image, result))
        probabilities = await result
        if np.isnan(probabilities).any():
            raise UserError(
                "the model gives NaN for this image; its weights may hold NaN, so serve another --checkpoint"
            )
        return probabilities

    async def run(self) -> None:
        """Takes what waits, batch by batch, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            some = [await self._waiting.get()]
            while len(some) < self._sizes[-1] and not self._waiting.empty():
                some.append(self._waiting.get_nowait())
            some = [(image, result) for image, result in some if not result.done()]  # its client may have gone
            if not some:
                continue
            self._seen(len(some))
            try:
                found = await loop.run_in_executor(self._device, self._compute, [image for image, _ in some])
            except Exception as e:
                for _, result in some:
                    if not result.done():
                        result.set_exception(e)
                continue
            for (_, result), probabilities in zip(some, found, strict=True):
                if not result.done():
                    result.set_result(probabilities)

    def _compute(self, images: list[np.ndarray]) -> np.ndarray:
        size = next(size for size in self._sizes if size >= len(images))
        batch = np.zeros((size, *images[0].shape), np.uint8)
        batch[: len(images)] = images
        placed = sharding.put_batch({"image": batch}, self._model.programs.mesh)["image"]
        return np.asarray(self._model.programs.predict(*self._model.state.evaluated, placed))[: len(images)]

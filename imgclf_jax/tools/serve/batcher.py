"""Images of many requests in one batch on the device."""

import asyncio
import collections
import concurrent.futures
import contextlib
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import decode_cost
from imgclf_jax.data.decode_cost import Costly
from imgclf_jax.trained import Trained, not_finite

_AT_ONCE = 2  # batches; one of them is decoded, and one is on the device
_BYTES_A_THREAD = 100_000  # of files, a few milliseconds' work, that one thread decodes at least
# What an image may cost, in pixels times scans and in bytes of its file: a batch decodes images of some 10 ms each.
# Larger ones, and those that are made to be slow, keep no batch waiting. The largest take a gigabyte: one at a time.
_IN_A_BATCH = 2**20, 256_000
_APART = 2**23, 4_000_000
_SECONDS = 0.2  # that a batch decodes: the files that are left go back, so that no client's batch is long

Image = bytes | np.ndarray  # the bytes of a file, or what has been prepared


def without_traceback[T](make: Callable[[bytes], T], image: bytes) -> T | UserError:
    """What `make` gives, or its error, without the traceback: its frames hold an image of hundreds of megabytes.

    In a future they would until Python looks for garbage, which it does not do for want of memory.
    """
    try:
        return make(image)
    except UserError as e:
        return type(e)(str(e))


class Busy(Exception):
    """So many images wait already that one more would not be answered in time."""


class Later(Exception):
    """An image for which the batch had no more time."""


class ByClient[T]:
    """A queue in which clients take turns, each with its oldest."""

    def __init__(self) -> None:
        self._of: dict[str, collections.deque[T]] = {}  # the client whose turn is next first

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def put(self, client: str, one: T) -> None:
        """The client's last."""
        self._of.setdefault(client, collections.deque()).append(one)

    def put_back(self, client: str, one: T) -> None:
        """The client's first. Its turn comes after the others'."""
        self._of.setdefault(client, collections.deque()).appendleft(one)

    def take(self) -> tuple[str, T]:
        """The client whose turn it is, and what it waits for. Raises StopIteration if nothing waits."""
        client = next(iter(self._of))
        ones = self._of.pop(client)
        one = ones.popleft()
        if ones:
            self._of[client] = ones
        return client, one


class Turns:
    """Calls functions in a few threads; clients take turns. Used from one event loop."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self.pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._waiting = ByClient[asyncio.Future[None]]()
        self._free = threads

    async def call[T](self, client: str, make: Callable[..., T], *arguments: Any) -> T:
        """Returns `make(*arguments)`. Cancelled before its turn, it is never called."""
        loop = asyncio.get_running_loop()
        if self._free:
            self._free -= 1
        else:
            turn: asyncio.Future[None] = loop.create_future()
            self._waiting.put(client, turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():
                    self._pass_on()
                raise
        job = self.pool.submit(make, *arguments)

        def ended(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(self._pass_on)

        job.add_done_callback(ended)
        return await asyncio.wrap_future(job)

    def _pass_on(self) -> None:
        """Lets the next client's oldest call begin; the client's other calls wait for its next turn."""
        while self._waiting:
            _, turn = self._waiting.take()
            if not turn.done():  # as if cancelled
                turn.set_result(None)
                return
        self._free += 1


class Batcher:
    """Classifies images that come one by one. While batches are computed, those that come make the next one.

    So nothing waits for a batch to fill, and under load batches fill by themselves. Two are in work at once: while the
    device has one, the images of the other are decoded, by several threads if the files are large. A batch has one of a
    few sizes, each of which is compiled when the batcher is made, and is padded to it. Large images are decoded apart,
    before they join a batch, so that small ones do not wait for them. Clients take turns. Used from one event loop.
    """

    def __init__(self, model: Trained, largest: int = 64, most_waiting: int = 512, seen: Callable[[int], Any] = int):
        """`seen` is called with the number of images of each batch."""
        self._model, self._seen, self._most_waiting = model, seen, most_waiting
        mesh = model.programs.mesh
        self._sizes = sorted({sharding.round_up(size, mesh) for size in (1, 8, largest)})
        self._waiting, self._some = ByClient[tuple[Image, asyncio.Future[np.ndarray]]](), asyncio.Event()
        self._name = f"batcher-{id(self):x}"  # what the names of its threads begin with
        self._workers = concurrent.futures.ThreadPoolExecutor(_AT_ONCE, thread_name_prefix=f"{self._name}-batch")
        self._decoders = concurrent.futures.ThreadPoolExecutor(thread_name_prefix=f"{self._name}-decode")
        self._apart = Turns(f"{self._name}-large", threads=4)
        self._largest = Turns(f"{self._name}-largest")  # one image at a time, which may take a gigabyte
        self._small = Turns(f"{self._name}-small")
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself holds no task
        self._device = threading.Lock()
        for size in self._sizes:
            self._compute([np.zeros(model.programs.recipe.data.image_shape, np.uint8)] * size)

    def close(self, seconds: float) -> bool:
        """Starts no more work, and waits so long for what has begun; whether it is done."""
        until = time.monotonic() + seconds
        for pool in (self._workers, self._decoders, self._apart.pool, self._largest.pool, self._small.pool):
            pool.shutdown(wait=False, cancel_futures=True)
        threads = [t for t in threading.enumerate() if t.name.startswith(self._name)]
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    @property
    def waiting(self) -> int:
        """How many images wait for a batch."""
        return len(self._waiting)

    async def predict(self, image: bytes, client: str = "") -> np.ndarray:
        """The probabilities f32[classes] of the image in a file of these bytes, which a client sent.

        Raises Busy if too many images wait, and UserError if it does not decode or the model gives NaN.
        """
        if self.waiting >= self._most_waiting:
            raise Busy
        result: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._put(client, image, result)
        return await result

    def _put(self, client: str, image: Image, result: asyncio.Future[np.ndarray]) -> None:
        self._waiting.put(client, (image, result))
        self._some.set()

    async def alone[T](self, client: str, make: Callable[[bytes], T], image: bytes) -> T | UserError:
        """What `make` gives for an image's file, or its UserError; clients take turns.

        An image that is too costly for a batch has its turn among such images, so that others do not wait for it.
        """

        def within_limit(image: bytes) -> T | UserError:
            with decode_cost.at_most(*_IN_A_BATCH):
                return without_traceback(make, image)

        made = await self._small.call(client, within_limit, image)
        return await self._largest.call(client, without_traceback, make, image) if isinstance(made, Costly) else made

    async def run(self) -> None:
        """Takes what waits, batch by batch, until it is cancelled."""
        free = asyncio.Semaphore(_AT_ONCE)
        while True:
            await free.acquire()
            while not self._waiting:
                self._some.clear()
                await self._some.wait()
            some = [self._waiting.take() for _ in range(min(self._sizes[-1], len(self._waiting)))]
            self._start(self._answer(some)).add_done_callback(lambda _: free.release())

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, some: list[tuple[str, tuple[Image, asyncio.Future[np.ndarray]]]]) -> None:
        some = [one for one in some if not one[1][1].done()]  # its client may have gone
        images, loop = [image for _, (image, _) in some], asyncio.get_running_loop()
        found: list[np.ndarray | Exception]
        try:
            found = await loop.run_in_executor(self._workers, self._classify, images)
        except Exception as e:
            found = [e] * len(some)
        for (client, own), one in reversed([*zip(some, found, strict=True)]):
            if isinstance(one, Later):  # the last first, so that the order stays
                self._waiting.put_back(client, own)
                self._some.set()
        for (client, (image, result)), one in zip(some, found, strict=True):
            if result.done() or isinstance(one, Later):
                continue
            if isinstance(one, Costly) and isinstance(image, bytes):
                self._start(self._decode_apart(client, image, result))
            elif isinstance(one, Exception):
                result.set_exception(one)
            else:
                result.set_result(one)

    async def _decode_apart(self, client: str, image: bytes, result: asyncio.Future[np.ndarray]) -> None:
        """Prepares an image that is too costly for a batch, and puts it into the next one."""
        kept = [image]
        del image
        result.add_done_callback(lambda _: kept.clear())  # the client has gone; the pool's queue has it still

        def prepare(limit: tuple[int, int] | None) -> np.ndarray | Exception | None:
            for image in kept:
                with decode_cost.at_most(*limit) if limit else contextlib.nullcontext():
                    return without_traceback(self._model.prepare, image)
            return None

        try:
            prepared = await self._apart.call(client, prepare, _APART)
            if isinstance(prepared, Costly):
                prepared = await self._largest.call(client, prepare, None)
        except Exception as e:
            prepared = e
        if isinstance(prepared, np.ndarray):
            self._put(client, prepared, result)
        elif isinstance(prepared, Exception) and not result.done():
            result.set_exception(prepared)

    def _classify(self, images: list[Image]) -> list[np.ndarray | Exception]:
        """The probabilities of each image, or why it has none."""
        prepared = self._prepare_all(images)
        whole = [image for image in prepared if isinstance(image, np.ndarray)]
        if whole:
            self._seen(len(whole))
        rows = iter(self._compute(whole) if whole else ())
        out = [image if isinstance(image, Exception) else next(rows) for image in prepared]
        wrong = [not_finite(row, "predict") if isinstance(row, np.ndarray) else "" for row in out]
        return [UserError(f"{why}, so serve another --checkpoint") if why else row
                for why, row in zip(wrong, out, strict=True)]  # fmt: skip

    def _prepare_all(self, images: list[Image]) -> list[np.ndarray | Exception]:
        """Each image as the model takes it, or why it does not decode."""
        threads = min(
            os.cpu_count() or 1, len(images), 1 + sum(len(i) for i in images if isinstance(i, bytes)) // _BYTES_A_THREAD
        )
        if threads == 1:
            return self._prepare(images)
        out: list[np.ndarray | Exception] = [Later()] * len(images)
        for i, share in enumerate(self._decoders.map(self._prepare, (images[i::threads] for i in range(threads)))):
            out[i::threads] = share
        return out

    def _prepare(self, images: Sequence[Image]) -> list[np.ndarray | Exception]:
        out, until = list[np.ndarray | Exception](), time.monotonic() + _SECONDS
        with decode_cost.at_most(*_IN_A_BATCH):
            for image in images:
                if isinstance(image, np.ndarray):
                    out.append(image)
                else:
                    late = out and time.monotonic() > until
                    out.append(Later() if late else without_traceback(self._model.prepare, image))
        return out

    def _compute(self, images: list[np.ndarray]) -> np.ndarray:
        size = next(size for size in self._sizes if size >= len(images))
        batch = np.zeros((size, *images[0].shape), np.uint8)
        batch[: len(images)] = images
        with self._device:
            # The program puts the batch on the devices by itself, for a third of what `sharding.put_batch` takes.
            return np.asarray(self._model.programs.predict(*self._model.state.evaluated, batch))[: len(images)]

"""Batches the images of many requests."""

import asyncio
import collections
import concurrent.futures
import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.serve import decode_cost
from imgclf_jax.tools.serve.decode_cost import Costly
from imgclf_jax.tools.serve.limits import Refused
from imgclf_jax.trained import Trained, not_finite

_AT_ONCE = 2  # batches: while one is on the device, the other is decoded
_SIZES = 1, 8, 64  # images in a batch; each size is a compiled program
_LOWER = 5  # in nice levels, a third of the CPU time; a thread that is preempted may hold the GIL, so not less
_BYTES_A_THREAD = 100_000  # the least a decoding thread gets, a few milliseconds of work
# Limits of an image in a batch, about 10 ms to decode: pixels times scans, and file size. Larger images, and those
# built to be slow, are decoded apart; beyond the second limit, where decoding may take a gigabyte, one at a time.
_IN_A_BATCH = 2**20, 256_000
_APART = 2**23, 4_000_000
_ALONE = math.inf, math.inf
_SECONDS = 0.2  # decoding time of a batch; the other files return to the queue, so that no client makes a batch slow

type Image = bytes | np.ndarray  # the bytes of a file, or a prepared image


def make_within[T](limits: tuple[float, float], make: Callable[[bytes], T], image: bytes) -> T | UserError:
    """Returns `make(image)` or its UserError, Costly if the image exceeds the limits of `decode_cost.check`.

    The error has no traceback, whose frames hold up to hundreds of megabytes. A future would keep them alive until the
    next garbage collection, which memory does not trigger.
    """
    try:
        decode_cost.check(image, *limits)
        return make(image)
    except UserError as e:
        return type(e)(str(e))


def yield_cpu() -> None:
    """Lowers the priority of the calling thread, so that the event loop and small images get the CPU first.

    It does nothing outside Linux, where priorities are those of processes.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _LOWER)  # at most 19


class Later(Exception):
    """The batch had no time left for this image."""


class ByClient[T]:
    """A queue that serves clients round-robin, and the items of each in order."""

    def __init__(self) -> None:
        self._by_client: dict[str, collections.deque[T]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def put(self, client: str, one: T) -> None:
        """Adds an item at the end of the client's queue."""
        self._by_client.setdefault(client, collections.deque()).append(one)

    def put_back(self, client: str, one: T) -> None:
        """Adds an item at the head of the client's queue. A client with no other items has the last turn."""
        self._by_client.setdefault(client, collections.deque()).appendleft(one)

    def take(self) -> tuple[str, T]:
        """Removes and returns (client, item) of the next turn. Raises StopIteration if the queue is empty."""
        client = next(iter(self._by_client))
        ones = self._by_client.pop(client)
        one = ones.popleft()
        if ones:
            self._by_client[client] = ones
        return client, one


class Turns:
    """Calls functions in a few threads, round-robin over clients. For use from one event loop."""

    def __init__(self, name: str, threads: int = 1, initializer: Callable[[], None] | None = None) -> None:
        self.pool = concurrent.futures.ThreadPoolExecutor(threads, name, initializer)
        self._waiting = ByClient[asyncio.Future[None]]()
        self._free = threads

    async def call[T](self, client: str, make: Callable[..., T], *arguments: Any) -> T:
        """Returns `make(*arguments)`, which is never called if this is cancelled before its turn."""
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
        """Starts the oldest call of the next client, whose other calls wait for its next turn."""
        while self._waiting:
            _, turn = self._waiting.take()
            if not turn.done():  # as if cancelled
                turn.set_result(None)
                return
        self._free += 1


class Batcher:
    """Classifies images that arrive one by one. Those that arrive while a batch is computed form the next batch.

    So no image waits for a batch to fill, and batches are fuller under load. Two batches are in progress: one is on the
    device while the images of the other are decoded, by several threads if the files are large. Batches are padded to
    one of a few sizes, whose programs are compiled at the start. Large images are decoded apart before they join a
    batch, so that small ones do not wait for them. Clients take turns. For use from one event loop.
    """

    def __init__(self, model: Trained, most_waiting: int = 512, seen: Callable[[int], Any] = int):
        """`seen` is called with the number of images of each batch."""
        self._model, self._seen, self._most_waiting = model, seen, most_waiting
        mesh = model.programs.mesh
        self._sizes = sorted({sharding.round_up(size, mesh) for size in _SIZES})
        self._waiting, self._some = ByClient[tuple[Image, asyncio.Future[np.ndarray]]](), asyncio.Event()
        self._name = f"batcher-{id(self):x}"  # the prefix of its threads' names
        self._workers = concurrent.futures.ThreadPoolExecutor(_AT_ONCE, thread_name_prefix=f"{self._name}-batch")
        self._decoders = concurrent.futures.ThreadPoolExecutor(thread_name_prefix=f"{self._name}-decode")
        self._apart = Turns(f"{self._name}-large", threads=4, initializer=yield_cpu)
        # One image at a time, since each may take a gigabyte.
        self._largest = Turns(f"{self._name}-largest", initializer=yield_cpu)
        self._small = Turns(f"{self._name}-small")
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop keeps only weak references to tasks
        self._device = threading.Lock()
        for size in self._sizes:
            self._compute([np.zeros(model.programs.recipe.data.image_shape, np.uint8)] * size)

    def close(self, seconds: float) -> bool:
        """Stops taking work and waits up to `seconds` for running work; returns whether it is done."""
        until = time.monotonic() + seconds
        for pool in (self._workers, self._decoders, self._apart.pool, self._largest.pool, self._small.pool):
            pool.shutdown(wait=False, cancel_futures=True)
        threads = [t for t in threading.enumerate() if t.name.startswith(self._name)]
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    @property
    def waiting(self) -> int:
        """The number of images waiting for a batch."""
        return len(self._waiting)

    async def predict(self, image: bytes, client: str = "") -> np.ndarray:
        """Returns f32[2, classes] for the bytes of an image file from a client: the outputs "ranked".

        Raises Refused if too many images are waiting, and UserError if it does not decode or the outputs are NaN.
        """
        if self.waiting >= self._most_waiting:
            raise Refused(503, "too many requests wait; try again in a second")
        result: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._put(client, image, result)
        return await result

    def _put(self, client: str, image: Image, result: asyncio.Future[np.ndarray]) -> None:
        self._waiting.put(client, (image, result))
        self._some.set()

    async def alone[T](self, client: str, make: Callable[[bytes], T], image: bytes) -> T | UserError:
        """Returns `make(image)` for the bytes of an image file, or its UserError; clients take turns.

        Images that are too costly for a batch have turns of their own, so that others do not wait for them.
        """
        made = await self._small.call(client, make_within, _IN_A_BATCH, make, image)
        return await self._largest.call(client, make_within, _ALONE, make, image) if isinstance(made, Costly) else made

    async def run(self) -> None:
        """Processes waiting images, batch by batch, until cancelled."""
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
        some = [one for one in some if not one[1][1].done()]  # the client may have disconnected
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
        """Prepares an image that is too costly for a batch, and adds it to the next one."""
        kept = [image]
        del image
        result.add_done_callback(lambda _: kept.clear())  # frees the image when the client disconnects, even queued

        def prepare(limits: tuple[float, float]) -> np.ndarray | Exception | None:
            for image in kept:  # empty once the client has disconnected
                return make_within(limits, self._model.prepare, image)
            return None

        try:
            prepared = await self._apart.call(client, prepare, _APART)
            if isinstance(prepared, Costly):
                prepared = await self._largest.call(client, prepare, _ALONE)
        except Exception as e:
            prepared = e
        if isinstance(prepared, np.ndarray):
            self._put(client, prepared, result)
        elif isinstance(prepared, Exception) and not result.done():
            result.set_exception(prepared)

    def _classify(self, images: list[Image]) -> list[np.ndarray | Exception]:
        """Returns the outputs "ranked" of each image, or the error that explains why it has none."""
        prepared = self._prepare_all(images)
        decoded = [image for image in prepared if isinstance(image, np.ndarray)]
        if decoded:
            self._seen(len(decoded))
        rows = iter(self._compute(decoded) if decoded else ())
        out = [image if isinstance(image, Exception) else next(rows) for image in prepared]
        wrong = [not_finite(row, "ranked") if isinstance(row, np.ndarray) else "" for row in out]
        return [UserError(f"{why}, so serve another --checkpoint") if why else row
                for why, row in zip(wrong, out, strict=True)]  # fmt: skip

    def _prepare_all(self, images: list[Image]) -> list[np.ndarray | Exception]:
        """Returns each image as the model's input, or the error that explains why it does not decode."""
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
        for image in images:
            if isinstance(image, np.ndarray):
                out.append(image)
            else:
                late = out and time.monotonic() > until
                out.append(Later() if late else make_within(_IN_A_BATCH, self._model.prepare, image))
        return out

    def _compute(self, images: list[np.ndarray]) -> np.ndarray:
        size = next(size for size in self._sizes if size >= len(images))
        batch = np.zeros((size, *images[0].shape), np.uint8)
        batch[: len(images)] = images
        with self._device:
            # Passing the NumPy batch to the program takes a third of the time of `sharding.put_batch`.
            out = np.asarray(self._model.programs.inference("ranked")(*self._model.state.evaluated, batch))
        return out.swapaxes(0, 1)[: len(images)]  # [n, 2, classes]

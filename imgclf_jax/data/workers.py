"""Reads batches in worker processes: threads decode at most about 6,000 photographs a second, as each holds the GIL.

A batch is a pure function of its step, so workers share nothing: of n workers, worker i reads every n-th batch whole,
into memory that it shares with this process. The memory has no name and a worker ends with its pipe, so nothing is left
behind however this process ends.
"""

import atexit
import collections
import contextlib
import itertools
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import jax
import numpy as np

from imgclf_jax.core import machine
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.typing import Batch

type Slots = list[list[Any]]  # the shared memory of batches: of each leaf, its bytes


def prepare() -> None:
    """Starts the process that workers fork from, whose imports take seconds. It and its workers get no Ctrl-C."""
    multiprocessing.set_forkserver_preload(["imgclf_jax.data.stream"])
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # which they inherit
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def read_by_workers(
    read: Callable[[int], Batch], steps: Iterator[int], like: Batch, workers: int, prefetch: int
) -> Iterator[tuple[int, Batch]]:
    """Yields each step with `read(step)`, whose arrays have the shapes and dtypes of `like`.

    Up to `workers + prefetch` batches are read ahead. Raises UserError if `read` cannot be pickled, such as a source
    with an open file, or if a worker ends; and what `read` raises.
    """
    try:
        content = cloudpickle.dumps(read)
    except Exception as e:  # a user's objects may raise anything
        raise UserError(f"data.workers={workers}: the source, or a host op, cannot be sent to a worker: {reason(e)}; "
                        "make it picklable, or set data.workers=0") from e  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    leaves, structure = jax.tree.flatten(like)
    depth = workers + prefetch
    slots = [[context.RawArray("B", leaf.nbytes) for leaf in leaves] for _ in range(depth)]
    pipes, processes = [], []
    for _ in range(workers):
        ours, theirs = context.Pipe()
        pipes.append(ours)
        processes.append(context.Process(target=_work, args=(theirs, content, slots), daemon=True))
        processes[-1].start()
        theirs.close()

    def ask(request: tuple[int, int]) -> tuple[int, int]:
        i, step = request
        with contextlib.suppress(ConnectionError):  # `take` says that the worker has ended
            pipes[i % workers].send((i % depth, step))
        return request

    def take(i: int) -> Batch:
        try:
            error = pipes[i % workers].recv()
        except (EOFError, OSError) as e:
            processes[i % workers].join()
            raise UserError(f"data worker {i % workers} ended with status {processes[i % workers].exitcode}; if the "
                            f"machine is out of memory, set fewer than data.workers={workers}") from e  # fmt: skip
        if error is not None:
            raise error
        arrays = [np.ndarray(leaf.shape, leaf.dtype, memory).copy()
                  for leaf, memory in zip(leaves, slots[i % depth], strict=True)]  # fmt: skip
        return jax.tree.unflatten(structure, arrays)

    def end() -> None:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(1)  # longer if it reads from a dead file server

    atexit.register(end)  # before multiprocessing's own, which would wait for them
    try:
        numbered = enumerate(steps)
        asked = collections.deque(map(ask, itertools.islice(numbered, depth)))
        while asked:
            i, step = asked.popleft()
            batch = take(i)
            asked.extend(map(ask, itertools.islice(numbered, 1)))
            yield step, batch
    finally:
        end()
        atexit.unregister(end)


def _work(pipe: Connection, content: bytes, slots: Slots) -> None:
    """Writes the batch of each (slot, step) that it receives, and answers None or an error, until the pipe ends."""
    machine.keep_freed_memory()
    jax.config.update("jax_platforms", "cpu")  # a user's op must not take the accelerator
    read: Callable[[int], Batch] | None = None
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            slot, step = pipe.recv()
            answer: BaseException | None = None
            try:
                read = read or cloudpickle.loads(content)
                for memory, leaf in zip(slots[slot], jax.tree.leaves(read(step)), strict=True):
                    np.ndarray(leaf.shape, leaf.dtype, memory)[...] = leaf
            except (UserError, MemoryError) as e:
                answer = e
            except BaseException:
                answer = RuntimeError(f"a data worker failed:\n{traceback.format_exc()}")
            pipe.send(answer)

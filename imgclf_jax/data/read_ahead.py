"""Prefetches batches while the device computes: by tf.data, or by threads.

Threads do if TensorFlow is not installed, and for images that are decoded once and then kept: importing TensorFlow
takes more CPU time than prefetching saves there.
"""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import jax
import numpy as np

from imgclf_jax.core import memory, tensorflow_import
from imgclf_jax.core.typing import Batch

_PARALLEL = 2  # batches that are read at once


def read_ahead(
    read: Callable[[int], Batch], steps: Iterable[int], prefetch: int, kept: bool = False
) -> Iterator[tuple[int, Batch]]:
    """Yields each step with `read(step)`, arrays in nested dicts, and reads up to `prefetch` steps ahead.

    The steps may be infinite. Threads read images that are `kept` in memory once they are decoded, and tf.data all
    others. The first batch, every batch without `prefetch`, and those during TensorFlow's import are read on demand.
    The batches are the same in every case.
    """
    steps = iter(steps)
    loading = None if kept or not prefetch else tensorflow_import.tensorflow()
    for step in steps:
        batch = read(step)
        yield step, batch
        if prefetch and (kept or (loading and loading.done() and not loading.result())):
            yield from _by_threads(read, steps, prefetch)
        elif loading and loading.done() and (tf := loading.result()):
            yield from _by_tensorflow(tf, read, steps, batch, prefetch)


def _by_threads(read: Callable[[int], Batch], steps: Iterator[int], prefetch: int) -> Iterator[tuple[int, Batch]]:
    pool = concurrent.futures.ThreadPoolExecutor(_PARALLEL, thread_name_prefix="read-ahead")
    ahead: collections.deque[tuple[int, concurrent.futures.Future[Batch]]] = collections.deque()
    try:
        for step in steps:
            ahead.append((step, pool.submit(read, step)))
            if len(ahead) > prefetch:
                first, reading = ahead.popleft()
                yield first, reading.result()
        for first, reading in ahead:
            yield first, reading.result()
    finally:  # also if the consumer stops early
        pool.shutdown(wait=False, cancel_futures=True)


def _by_tensorflow(
    tf: ModuleType, read: Callable[[int], Batch], steps: Iterator[int], like: Batch, prefetch: int
) -> Iterator[tuple[int, Batch]]:
    """`like` is a batch with the names and dtypes of all."""
    leaves, structure = jax.tree.flatten(like)
    failures: list[BaseException] = []

    @tf.autograph.experimental.do_not_convert
    def read_one(step: Any) -> Any:
        return step, *tf.numpy_function(read_arrays, [step], [leaf.dtype for leaf in leaves])

    def read_arrays(step: np.ndarray) -> list[np.ndarray]:
        try:
            return jax.tree.leaves(read(int(step)))
        except Exception as e:
            failures.append(e)  # tf.data keeps only its text
            raise

    dataset = tf.data.Dataset.from_generator(lambda: steps, output_signature=tf.TensorSpec((), tf.int64))
    batches = dataset.map(read_one, num_parallel_calls=_PARALLEL, deterministic=True).prefetch(prefetch)
    options = tf.data.Options()
    # There is nothing to tune, and the tuner's thread can delay the end of the iterator by a minute.
    options.autotune.enabled = False
    try:
        for i, (step, *arrays) in enumerate(batches.with_options(options).as_numpy_iterator()):
            if not i:
                memory.keep_freed()  # TensorFlow undoes it at the first `Dataset.from_generator`
            yield int(step), jax.tree.unflatten(structure, arrays)
    except tf.errors.OpError as e:
        raise (failures[0] if failures else e) from None

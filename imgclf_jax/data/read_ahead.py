"""Prefetches batches while the device computes: by worker processes, tf.data, or threads without TensorFlow."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import jax
import numpy as np

from imgclf_jax.core import machine, tensorflow_import
from imgclf_jax.core.typing import Batch
from imgclf_jax.data import workers as data_workers

_PARALLEL = 2  # batches that are read at once


def read_ahead(
    read: Callable[[int], Batch], steps: Iterable[int], prefetch: int, workers: int = 0
) -> Iterator[tuple[int, Batch]]:
    """Yields each step with `read(step)`, arrays in nested dicts, and reads up to `prefetch` steps ahead.

    The steps may be infinite. The first batch, every batch without `prefetch`, and those during TensorFlow's import are
    read on demand. Worker processes read further ahead. The batches are the same in every case.
    """
    steps, workers = iter(steps), workers if prefetch else 0
    loading = tensorflow_import.tensorflow() if prefetch and not workers else None
    if workers:
        data_workers.prepare()
    for step in steps:
        batch = read(step)
        yield step, batch
        if workers:
            yield from data_workers.read_by_workers(read, steps, batch, workers, prefetch)
        if loading and loading.done():
            by_threads = map_ahead(lambda step: (step, read(step)), steps, _PARALLEL, prefetch)
            tf = loading.result()
            yield from _by_tensorflow(tf, read, steps, batch, prefetch) if tf else by_threads


def run_ahead[T](items: Iterable[T], count: int) -> Iterator[T]:
    """Yields the items, `count` of them after the next ones have been taken."""
    taken = collections.deque[T]()
    for item in items:
        taken.append(item)
        if len(taken) > count:
            yield taken.popleft()
    yield from taken


def map_ahead[T, R](function: Callable[[T], R], items: Iterable[T], threads: int, count: int) -> Iterator[R]:
    """Yields the function's result for each item, in order, while threads compute up to `count` of the next ones."""
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
    try:
        for future in run_ahead((pool.submit(function, item) for item in items), count):
            yield future.result()
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
                machine.keep_freed_memory()  # TensorFlow undoes it at the first `Dataset.from_generator`
            yield int(step), jax.tree.unflatten(structure, arrays)
    except tf.errors.OpError as e:
        raise (failures[0] if failures else e) from None

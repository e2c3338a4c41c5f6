"""Prefetches batches while the device computes: by tf.data, or by threads.

Threads do if TensorFlow is not installed, and for images that are decoded once and then kept: importing TensorFlow
takes more CPU time than prefetching saves there.
"""

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from imgclf_jax.core import memory, tensorflow_import

type Batch = dict[str, np.ndarray]

_PARALLEL = 2  # batches that are read at once
_TYPES = {
    "image": np.uint8,
    "label": np.int32,
    "target": np.float32,
    "mask": np.bool_,
    "id": np.int32,
    "epoch": np.int32,
}


def read_ahead(
    read: Callable[[range], Batch], ranges: Iterable[range], names: tuple[str, ...], prefetch: int, kept: bool = False
) -> Iterator[tuple[range, Batch]]:
    """Yields each range with `read(range)`, arrays of these names ("label", "unlabeled/label"), `prefetch` ahead.

    The ranges may be infinite. Threads read images that are `kept` in memory once they are decoded, and tf.data all
    others. Without `prefetch`, and while TensorFlow is being imported, each range is read on demand. The batches are
    the same in every case.
    """
    ranges = iter(ranges)
    if prefetch and kept:
        yield from _by_threads(read, ranges, prefetch)
        return
    loading = tensorflow_import.tensorflow() if prefetch else None
    for current in ranges:
        if loading and loading.done():
            rest, tf = itertools.chain([current], ranges), loading.result()
            yield from _by_tensorflow(tf, read, rest, names, prefetch) if tf else _by_threads(read, rest, prefetch)
            return
        yield current, read(current)


def _by_threads(
    read: Callable[[range], Batch], ranges: Iterator[range], prefetch: int
) -> Iterator[tuple[range, Batch]]:
    pool = concurrent.futures.ThreadPoolExecutor(_PARALLEL, thread_name_prefix="read-ahead")
    ahead: collections.deque[tuple[range, concurrent.futures.Future[Batch]]] = collections.deque()
    try:
        for current in ranges:
            ahead.append((current, pool.submit(read, current)))
            if len(ahead) > prefetch:
                first, reading = ahead.popleft()
                yield first, reading.result()
        for first, reading in ahead:
            yield first, reading.result()
    finally:  # also if the consumer stops early
        pool.shutdown(wait=False, cancel_futures=True)


def _by_tensorflow(
    tf: ModuleType, read: Callable[[range], Batch], ranges: Iterator[range], names: tuple[str, ...], prefetch: int
) -> Iterator[tuple[range, Batch]]:
    failures: list[BaseException] = []

    @tf.autograph.experimental.do_not_convert
    def read_one(edges: Any) -> Any:
        return edges, *tf.numpy_function(read_arrays, [edges], [_TYPES[name.rpartition("/")[2]] for name in names])

    def read_arrays(edges: np.ndarray) -> list[np.ndarray]:
        try:
            batch = read(range(*edges.tolist()))
        except Exception as e:
            failures.append(e)  # tf.data keeps only its text
            raise
        return [batch[name] for name in names]

    def edges() -> Iterator[tuple[int, int]]:
        return ((one.start, one.stop) for one in ranges)

    dataset = tf.data.Dataset.from_generator(edges, output_signature=tf.TensorSpec(2, tf.int64))
    batches = dataset.map(read_one, num_parallel_calls=_PARALLEL, deterministic=True).prefetch(prefetch)
    options = tf.data.Options()
    # There is nothing to tune, and the tuner's thread can delay the end of the iterator by a minute.
    options.autotune.enabled = False
    try:
        for i, (both, *arrays) in enumerate(batches.with_options(options).as_numpy_iterator()):
            if not i:
                memory.keep_freed_again()
            yield range(*both.tolist()), dict(zip(names, arrays, strict=True))
    except tf.errors.OpError as e:
        raise (failures[0] if failures else e) from None

"""Batches read in the background by tf.data, while the device computes."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from imgclf_jax.core import tensorflow_import

Batch = dict[str, np.ndarray]

_TYPES = {
    "image": np.uint8,
    "label": np.int32,
    "target": np.float32,
    "mask": np.bool_,
    "id": np.int32,
    "epoch": np.int32,
}


def read_ahead(
    read: Callable[[range], Batch], ranges: Iterable[range], names: tuple[str, ...], prefetch: int
) -> Iterator[tuple[range, Batch]]:
    """Each range with what `read` gives for it, arrays of these names ("label", "unlabeled/label"), `prefetch` ahead.

    The ranges may be endless: they are asked for one by one. While TensorFlow is being imported, where it is not
    installed, and without `prefetch`, each is read when it is asked for. The batches are the same.
    """
    ranges = iter(ranges)
    loading = tensorflow_import.tensorflow() if prefetch else None
    for one in ranges:
        if loading and loading.done() and (tf := loading.result()):
            yield from _by_tensorflow(tf, read, itertools.chain([one], ranges), names, prefetch)
            return
        yield one, read(one)


def _by_tensorflow(
    tf: Any, read: Callable[[range], Batch], ranges: Iterator[range], names: tuple[str, ...], prefetch: int
) -> Iterator[tuple[range, Batch]]:
    failures: list[BaseException] = []

    @tf.autograph.experimental.do_not_convert
    def read_one(edges: Any) -> Any:
        return edges, *tf.numpy_function(read_arrays, [edges], [_TYPES[name.rpartition("/")[2]] for name in names])

    def read_arrays(edges: np.ndarray) -> list[np.ndarray]:
        try:
            batch = read(range(*edges.tolist()))
        except Exception as e:
            failures.append(e)  # tf.data would turn it into a string
            raise
        return [batch[name] for name in names]

    def edges() -> Iterator[tuple[int, int]]:
        return ((one.start, one.stop) for one in ranges)

    dataset = tf.data.Dataset.from_generator(edges, output_signature=tf.TensorSpec(2, tf.int64))
    batches = dataset.map(read_one, num_parallel_calls=2, deterministic=True).prefetch(prefetch)
    options = tf.data.Options()
    # Nothing here is left to tune, and the tuner's thread can hold up the end of the iterator for a minute.
    options.autotune.enabled = False
    try:
        for both, *arrays in batches.with_options(options).as_numpy_iterator():
            yield range(*both.tolist()), dict(zip(names, arrays, strict=True))
    except tf.errors.OpError as e:
        raise (failures[0] if failures else e) from None

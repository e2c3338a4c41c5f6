"""Batches on the device, from a stream on the host or from the whole set kept on the accelerator."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from imgclf_jax import sharding
from imgclf_jax.data import stream
from imgclf_jax.errors import UserError

DeviceBatch = dict[str, jax.Array]


def host_batches(
    images: stream.Images, mesh: Mesh, seed: int, batch_size: int, start: int, stop: int
) -> Iterator[DeviceBatch]:
    """Streamed batches; the copy of each to the device begins while the step before it runs."""
    shard = (jax.process_index(), jax.process_count())
    for batch in stream.train_batches(images, seed, batch_size, start, stop, *shard):
        yield sharding.put_batch(batch, mesh)


def device_batches(
    images: stream.Images, mesh: Mesh, seed: int, batch_size: int, start: int, stop: int
) -> Iterator[DeviceBatch]:
    """The same batches, bit for bit, gathered on the device; only ids travel. Needs no TensorFlow."""
    if images.random:
        raise UserError(
            f"data.placement='device' keeps decoded images, but preprocess={images.preprocess!r} draws at random; "
            "use data.placement='host', or move the randomness to augment"
        )
    everything = np.arange(len(images), dtype=np.int64)
    table = jax.device_put(images.read(everything, everything), sharding.replicated(mesh))

    def gather(table: DeviceBatch, ids: jax.Array) -> DeviceBatch:
        return {name: values[ids] for name, values in table.items()}

    gather = jax.jit(gather, out_shardings=sharding.sharded(mesh))
    for step in range(start, stop):
        yield gather(table, stream.example_ids(seed, step, batch_size, len(images)).astype(np.int32))


def train_batches(
    placement: str, images: stream.Images, mesh: Mesh, seed: int, batch_size: int, start: int, stop: int
) -> Iterator[DeviceBatch]:
    """The batches of steps start to stop under `placement`, "host" or "device"."""
    batches = {"host": host_batches, "device": device_batches}[placement]
    return batches(images, mesh, seed, batch_size, start, stop)

"""Batches on the devices: streamed from the host, or gathered from a data set kept on the accelerator.

A batch is what a step trains on, {"image": uint8[b, h, w, c], "label": i32[b]}.

- A source with targets has "target" f32[b, targets] instead of "label".
- Batches of a stream `needs_ids` also have "id" and "epoch" i32[b].
- With several seeds, b covers all of them: see `stream`.
- An extra stream (`data.extra`) is a nested batch by its name, always with "id" and "epoch".

The table of a data set on the accelerator holds flat images, uint8[n, h * w * c]. Of uint8[n, h, w, c] XLA would make a
copy in another layout at each step on TPU, four times as large for images of 32 x 32 x 3.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from imgclf_jax.core import machine, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Batch
from imgclf_jax.data import stream
from imgclf_jax.data.stream import StreamSpec

_BLOCK = 8  # steps whose batches are gathered at once: a program of its own for each took 3 % of a small step on CPU


def batch_shape(rows: int, image_shape: tuple[int, ...], targets: int, mesh: Mesh, **columns: str) -> Batch:
    """The shapes, dtypes and shardings of a batch of `rows` examples.

    `targets` is the number of targets per example, 0 with labels. `columns` are the dtypes of further values [b], such
    as mask="bool".
    """
    placed, y = sharding.sharded(mesh), {"target": ((targets,), "float32")} if targets else {"label": ((), "int32")}
    values = {"image": (image_shape, "uint8"), **y, **{name: ((), dtype) for name, dtype in columns.items()}}
    return {name: jax.ShapeDtypeStruct((rows, *own), dtype, sharding=placed) for name, (own, dtype) in values.items()}


def table_shape(examples: int, image_shape: tuple[int, ...], targets: int, mesh: Mesh) -> Batch:
    """The shapes, dtypes and shardings of a data set of images [h, w, c] that is kept on the devices."""
    batch = batch_shape(examples, (math.prod(image_shape),), targets, mesh)
    return {name: x.update(sharding=sharding.replicated(mesh)) for name, x in batch.items()}


def gather(table: Batch, ids: jax.Array, image_shape: tuple[int, ...]) -> Batch:
    """The examples `ids` i32[b] of a table: {"image": uint8[b, h, w, c], "label": i32[b]}.

    `image_shape` is (h, w, c), since a table of flat images does not have it.
    """
    batch = {name: values.at[ids].get(mode="promise_in_bounds") for name, values in table.items()}
    return batch | {"image": batch["image"].reshape(ids.size, *image_shape)}


def batches(
    placement: str, images: stream.Images, spec: StreamSpec, steps: Iterable[int], mesh: Mesh
) -> Iterator[tuple[int, Batch]]:
    """Yields each step with its batch on the devices.

    With the `placement` "host" they are streamed. With "device" the same batches, bit for bit, are gathered on the
    device: only ids travel, and no TensorFlow is needed. Raises UserError for "device" if host ops are random, or if
    the data set needs more memory than there is.
    """
    if placement == "host":
        rows = functools.partial(sharding.rows_here, mesh=mesh)
        for step, batch in stream.batches(images, spec, steps, rows):
            yield step, sharding.put_batch(batch, mesh)  # the copy overlaps the step before it
        return
    streams = {"": (images, spec)} | {extra.name: (images.extra[extra.name], extra) for extra in spec.extra_streams}
    for own, _ in streams.values():
        if own.random:
            raise UserError(f"data.placement='device' keeps decoded images, but {own.host_ops} is "
                            "random; use data.placement='host', or move the randomness to augment")  # fmt: skip
    nbytes = sum(len(own) * (math.prod(own.shape) + 4 * len(own.source.target_names)) for own, _ in streams.values())
    count = sum(len(own) for own, _ in streams.values())
    machine.require_memory(nbytes, f"data.placement='device': {count:,} decoded images")
    readers = {name: _resident(own, own_spec, mesh) for name, (own, own_spec) in streams.items()}
    for step in steps:
        batch = {name: read(step) for name, read in readers.items()}
        yield step, {**batch.pop(""), **batch}


def _resident(images: stream.Images, spec: StreamSpec, mesh: Mesh) -> Callable[[int], Batch]:
    """Puts a data set on the devices; returns the function from a step to its batch."""
    everything = np.arange(len(images), dtype=np.int64)
    examples = images.read(everything, everything)
    examples["image"] = examples["image"].reshape(len(images), -1)
    table = sharding.put_replicated(examples, mesh)
    rows = sharding.rows_here(spec.batch_size, mesh)

    @functools.partial(jax.jit, out_shardings=sharding.sharded(mesh))
    def gather_block(table: Batch, block: Batch) -> list[Batch]:
        steps = [{name: x[:, i] for name, x in block.items()} for i in range(_BLOCK)]
        return [gather(table, ids["id"], images.shape) | (ids if spec.needs_ids else {}) for ids in steps]

    @functools.lru_cache(1)
    def read_block(block: int) -> list[Batch]:
        positions = np.arange(block * _BLOCK, (block + 1) * _BLOCK) * spec.batch_size + rows[:, None]  # [b, steps]
        ids = [images.sampler.ids(seed, positions.ravel()).reshape(positions.shape) for seed in spec.seeds]
        epochs = [positions // images.sampler.epoch] * spec.num_seeds
        both = {"id": stream.interleave(ids), "epoch": stream.interleave(epochs)}
        return gather_block(table, sharding.put_batch({name: x.astype(np.int32) for name, x in both.items()}, mesh))

    return lambda step: read_block(step // _BLOCK)[step % _BLOCK]

"""Chunks of batches on the devices: streamed from the host, or gathered from a data set kept on the accelerator.

A chunk is the input of one call of a compiled program, the batches of k steps: {"image": uint8[k, b, h, w, c],
"label": i32[k, b]}, or {"id": i32[k, b], "table": {"image": uint8[n, h, w, c], "label": i32[n]}}.

- A source with targets has "target" f32[…, targets] instead of "label".
- Chunks and batches of a stream `with_ids` also have "id" and "epoch" i32[k, b].
- With several seeds, b covers all of them: see `stream`.
- An extra stream (`data.extra`) is a nested chunk by its name, always with "id" and "epoch".

On TPU the table holds each image as whole tiles, uint8[n, 8 m, 128]. Of uint8[n, h, w, c] XLA would make a copy in
another layout at each call, four times as large for images of 32 x 32 x 3, whose rows are padded to 128. For the same
reason targets are transposed there, "target_columns" f32[k, n].
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

from imgclf_jax.core import memory, platform, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Batch, Chunk
from imgclf_jax.data import stream
from imgclf_jax.data.stream import StreamSpec

_TILE = (8, 128)  # a tile of uint8 on TPU


def chunk_shape(
    placement: str, examples: int, image_shape: tuple[int, ...], spec: StreamSpec, size: int, mesh: Mesh,
    targets: int = 0,
) -> Chunk:  # fmt: skip
    """The shapes, dtypes and shardings of the chunks of `train_chunks`, for images uint8[examples, h, w, c].

    `targets` is the number of targets per example, 0 with labels. Raises UserError for more examples than placement
    "device" can number in 32 bits.
    """
    if placement == "device" and examples > np.iinfo(np.int32).max:
        raise UserError(f"data.placement='device' numbers examples in 32 bits, but there are {examples:,}; use "
                        "data.placement='host'")  # fmt: skip
    sharded, replicated = sharding.sharded(mesh, axis=1), sharding.replicated(mesh)
    rows, placed = ((examples,), replicated) if placement == "device" else ((size, spec.rows), sharded)
    image = _table_shape(image_shape, mesh) if placement == "device" else image_shape
    images = {"image": jax.ShapeDtypeStruct((*rows, *image), np.uint8, sharding=placed)}
    if placement == "device" and _is_transposed(targets, mesh):
        images["target_columns"] = jax.ShapeDtypeStruct((targets, *rows), np.float32, sharding=placed)
    else:
        name, (shape, dtype) = _y_spec(targets)
        images[name] = jax.ShapeDtypeStruct((*rows, *shape), dtype, sharding=placed)
    per_row = jax.ShapeDtypeStruct((size, spec.rows), np.int32, sharding=sharded)
    ids = {"id": per_row, "epoch": per_row} if spec.with_ids else {}
    return {**images, **ids} if placement == "host" else {"id": per_row, **ids, "table": images}


def eval_chunk_shape(image_shape: tuple[int, ...], batch_size: int, size: int, mesh: Mesh, targets: int = 0) -> Chunk:
    """The same for evaluation: {"image": uint8[k, b, h, w, c], "label": i32[k, b], "mask": bool[k, b]}."""
    name, y = _y_spec(targets)
    shapes = {"image": (image_shape, "uint8"), name: y, "mask": ((), "bool")}
    sharded = sharding.sharded(mesh, axis=1)
    return {
        name: jax.ShapeDtypeStruct((size, batch_size, *shape), dtype, sharding=sharded)
        for name, (shape, dtype) in shapes.items()
    }


def _y_spec(targets: int) -> tuple[str, tuple[tuple[int, ...], str]]:
    """The name, shape and dtype of an example's label or targets in a batch."""
    return ("target", ((targets,), "float32")) if targets else ("label", ((), "int32"))


def _is_transposed(targets: int, mesh: Mesh) -> bool:
    """Whether the table of targets is transposed: TPU would pad the row of each example to 128 numbers."""
    return bool(targets) and platform.platform_of(mesh) == "tpu"


def _table_shape(image_shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
    """The shape of an image in the table on these devices."""
    if platform.platform_of(mesh) != "tpu":
        return image_shape
    rows, columns = _TILE
    return (rows * -(-math.prod(image_shape) // math.prod(_TILE)), columns)


def _to_table(examples: stream.Batch, mesh: Mesh) -> stream.Batch:
    """Converts examples to a table for these devices, padding the last tile of each image with zeros."""
    images, table = examples["image"], dict(examples)
    if "target" in table and _is_transposed(table["target"].shape[1], mesh):
        table["target_columns"] = np.ascontiguousarray(table.pop("target").T)
    if (shape := _table_shape(images.shape[1:], mesh)) != images.shape[1:]:
        flat = images.reshape(len(images), -1)
        table["image"] = np.pad(flat, ((0, 0), (0, math.prod(shape) - flat.shape[1]))).reshape(-1, *shape)
    return table


def batch_at(
    chunk: Chunk, step: jax.Array | int, image_shape: tuple[int, ...],
    extra: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Batch:  # fmt: skip
    """The batch {"image": uint8[b, h, w, c], "label": i32[b]} of step `step` of the chunk, counted from 0.

    `image_shape` is (h, w, c), since a table of tiles does not have it; `extra` has that of each extra stream, whose
    batch is nested in this one.
    """
    nested = {name: batch_at(chunk[name], step, shape) for name, shape in extra.items()}
    own = {name: values for name, values in chunk.items() if name != "table" and name not in nested}
    batch = {name: lax.dynamic_index_in_dim(values, step, keepdims=False) for name, values in own.items()}
    if "table" not in chunk:
        return {**batch, **nested}
    ids = batch["id"] if "epoch" in batch else batch.pop("id")
    table = dict(chunk["table"])
    columns = table.pop("target_columns", None)
    gathered = {name: values.at[ids].get(mode="promise_in_bounds") for name, values in table.items()}
    if columns is not None:
        gathered["target"] = columns.at[:, ids].get(mode="promise_in_bounds").T
    if gathered["image"].shape[1:] != image_shape:
        flat = gathered["image"].reshape(ids.size, -1)
        gathered["image"] = flat[:, : math.prod(image_shape)].reshape(ids.size, *image_shape)
    return {**gathered, **batch, **nested}


def train_chunks(
    placement: str, images: stream.Images, spec: StreamSpec, ranges: Iterable[range], size: int, mesh: Mesh
) -> Iterator[tuple[range, Chunk]]:
    """Yields each range of steps with its chunk, padded to `size` steps; `placement` is "host" or "device"."""
    chunks = {"host": _host_chunks, "device": _device_chunks}[placement]
    return chunks(images, spec, ranges, size, mesh)


def _host_chunks(
    images: stream.Images, spec: StreamSpec, ranges: Iterable[range], size: int, mesh: Mesh
) -> Iterator[tuple[range, Chunk]]:
    """Streams chunks; the copy of each to the device overlaps the run of the one before it."""
    rows = sharding.rows_here(spec.batch_size, mesh)
    extra_rows = {name: sharding.rows_here(batch_size, mesh) for name, batch_size in spec.extra}
    for steps, chunk in stream.train_chunks(images, spec, ranges, size, rows, extra_rows=extra_rows):
        yield steps, sharding.put_batch(chunk, mesh, axis=1)


def _device_chunks(
    images: stream.Images, spec: StreamSpec, ranges: Iterable[range], size: int, mesh: Mesh
) -> Iterator[tuple[range, Chunk]]:
    """Gathers the same batches, bit for bit, on the device: only ids travel. Needs no TensorFlow."""
    streams = {"": (images, spec)} | {extra.name: (images.extra[extra.name], extra) for extra in spec.extra_streams}
    for own, _ in streams.values():
        if own.random:
            raise UserError(
                f"data.placement='device' keeps decoded images, but preprocess={own.preprocess!r} is random; use "
                "data.placement='host', or move the randomness to augment"
            )
    nbytes = sum(len(own) * (math.prod(own.shape) + 4 * len(own.target_names)) for own, _ in streams.values())
    count = sum(len(own) for own, _ in streams.values())
    memory.require(nbytes, f"data.placement='device': {count:,} decoded images")
    tables = {name: _table(own, mesh) for name, (own, _) in streams.items()}
    for steps in ranges:
        chunk = {name: {**_ids(own, own_spec, steps, size, mesh), "table": tables[name]}
                 for name, (own, own_spec) in streams.items()}  # fmt: skip
        yield steps, {**chunk.pop(""), **chunk}


def _table(images: stream.Images, mesh: Mesh) -> Batch:
    everything = np.arange(len(images), dtype=np.int64)
    return sharding.put_replicated(_to_table(images.read(everything, everything), mesh), mesh)


def _ids(images: stream.Images, spec: StreamSpec, steps: range, size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The example ids of these steps and, for a stream `with_ids`, the epochs, i32[size, rows] on the devices."""
    rows = sharding.rows_here(spec.batch_size, mesh)
    positions = stream.positions(steps, spec.batch_size, rows)
    replicas = {"id": [images.ids(seed, positions) for seed in spec.seeds]}
    if spec.with_ids:
        replicas["epoch"] = [images.epochs(positions)] * spec.num_seeds
    chunk = {k: stream.interleave(v, rows.size, size).astype(np.int32) for k, v in replicas.items()}
    return sharding.put_batch(chunk, mesh, axis=1)

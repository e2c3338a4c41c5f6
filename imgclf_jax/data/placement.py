"""Chunks of batches on the device, streamed from the host or gathered from the whole set kept on the accelerator.

A chunk is what one call of a compiled program works on: the batches of k steps, {"image": uint8[k, b, h, w, c],
"label": i32[k, b]}, or {"id": i32[k, b], "table": {"image": uint8[n, h, w, c], "label": i32[n]}}. Of a source with
targets it holds "target" f32[…, targets] in place of "label". Where the stream is `with_ids` both have the examples'
`id` and `epoch` i32[k, b], and so have the batches. Of several seeds b is that of all together, see `stream`. A
further stream (`data.extra`) is such a chunk in the chunk, by its name, always with `id` and `epoch`.

On TPU the table has an image's bytes in whole blocks, uint8[n, 8 m, 128]. Of uint8[n, h, w, c] XLA makes a copy in
another layout at each call of a program: four times as large for images of 32 x 32 x 3, whose rows are padded to 128.
For the same reason targets are a table "target_columns" f32[k, n] there.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

from imgclf_jax.core import memory, platform, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import stream
from imgclf_jax.data.stream import StreamSpec

_BLOCK = (8, 128)  # of bytes: the least tile of uint8 on TPU


def chunk_shape(
    placement: str, examples: int, image_shape: tuple[int, ...], spec: StreamSpec, size: int, mesh: Mesh,
    targets: int = 0,
) -> Any:  # fmt: skip
    """The shapes, dtypes and shardings of the chunks that `train_chunks` gives for images uint8[examples, h, w, c].

    `targets` is the number of targets of an example, 0 with labels.
    Raises UserError for more examples than placement "device" can number in 32 bits.
    """
    if placement == "device" and examples > np.iinfo(np.int32).max:
        raise UserError(f"data.placement='device' numbers examples in 32 bits, and there are {examples:,}; use "
                        "data.placement='host'")  # fmt: skip
    split, whole = sharding.sharded(mesh, axis=1), sharding.replicated(mesh)
    rows, where = ((examples,), whole) if placement == "device" else ((size, spec.rows), split)
    image = _in_table(image_shape, mesh) if placement == "device" else image_shape
    images = {"image": jax.ShapeDtypeStruct((*rows, *image), np.uint8, sharding=where)}
    if placement == "device" and _in_columns(targets, mesh):
        images["target_columns"] = jax.ShapeDtypeStruct((targets, *rows), np.float32, sharding=where)
    else:
        name, (shape, dtype) = _y_of(targets)
        images[name] = jax.ShapeDtypeStruct((*rows, *shape), dtype, sharding=where)
    each = jax.ShapeDtypeStruct((size, spec.rows), np.int32, sharding=split)
    known = {"id": each, "epoch": each} if spec.with_ids else {}
    return {**images, **known} if placement == "host" else {"id": each, **known, "table": images}


def eval_chunk_shape(image_shape: tuple[int, ...], batch_size: int, size: int, mesh: Mesh, targets: int = 0) -> Any:
    """The same for evaluation: {"image": uint8[k, b, h, w, c], "label": i32[k, b], "mask": bool[k, b]}."""
    name, y = _y_of(targets)
    shapes = {"image": (image_shape, "uint8"), name: y, "mask": ((), "bool")}
    split = sharding.sharded(mesh, axis=1)
    return {
        name: jax.ShapeDtypeStruct((size, batch_size, *shape), dtype, sharding=split)
        for name, (shape, dtype) in shapes.items()
    }


def _y_of(targets: int) -> tuple[str, tuple[tuple[int, ...], str]]:
    """The name of an example's label or targets in a batch, its shape and its dtype."""
    return ("target", ((targets,), "float32")) if targets else ("label", ((), "int32"))


def _in_columns(targets: int, mesh: Mesh) -> bool:
    """Whether the table of targets is transposed: in rows, TPU would pad each example's to 128 numbers."""
    return bool(targets) and platform.platform_of(mesh) == "tpu"


def _in_table(image_shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
    """The shape of an image in a table on these devices."""
    if platform.platform_of(mesh) != "tpu":
        return image_shape
    rows, columns = _BLOCK
    return (rows * -(-math.prod(image_shape) // math.prod(_BLOCK)), columns)


def _as_table(examples: stream.Batch, mesh: Mesh) -> stream.Batch:
    """Examples as a table on these devices has them: the last block of each image is filled with zeros."""
    images, table = examples["image"], dict(examples)
    if "target" in table and _in_columns(table["target"].shape[1], mesh):
        table["target_columns"] = np.ascontiguousarray(table.pop("target").T)
    if (shape := _in_table(images.shape[1:], mesh)) != images.shape[1:]:
        flat = images.reshape(len(images), -1)
        table["image"] = np.pad(flat, ((0, 0), (0, math.prod(shape) - flat.shape[1]))).reshape(-1, *shape)
    return table


def batch_at(
    chunk: Any, step: jax.Array | int, image_shape: tuple[int, ...],
    extra: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """The batch of the chunk's step number `step`, 0 being its first: {"image": uint8[b, h, w, c], "label": i32[b]}.

    `image_shape` is (h, w, c), which a table in blocks does not tell. `extra` has that of each further stream, whose
    batch is a dict in this one.
    """
    further = {name: batch_at(chunk[name], step, shape) for name, shape in extra.items()}
    own = {name: values for name, values in chunk.items() if name != "table" and name not in further}
    batch = {name: lax.dynamic_index_in_dim(values, step, keepdims=False) for name, values in own.items()}
    if "table" not in chunk:
        return {**batch, **further}
    ids = batch["id"] if "epoch" in batch else batch.pop("id")
    table = dict(chunk["table"])
    columns = table.pop("target_columns", None)
    gathered = {name: values.at[ids].get(mode="promise_in_bounds") for name, values in table.items()}
    if columns is not None:
        gathered["target"] = columns.at[:, ids].get(mode="promise_in_bounds").T
    if gathered["image"].shape[1:] != image_shape:
        flat = gathered["image"].reshape(ids.size, -1)
        gathered["image"] = flat[:, : math.prod(image_shape)].reshape(ids.size, *image_shape)
    return {**gathered, **batch, **further}


def train_chunks(
    placement: str, images: stream.Images, spec: StreamSpec, ranges: Iterable[range], size: int, mesh: Mesh
) -> Iterator[tuple[range, Any]]:
    """Each range of steps with its chunk under `placement`, "host" or "device", padded to `size` steps."""
    chunks = {"host": _host_chunks, "device": _device_chunks}[placement]
    return chunks(images, spec, ranges, size, mesh)


def _host_chunks(
    images: stream.Images, spec: StreamSpec, ranges: Iterable[range], size: int, mesh: Mesh
) -> Iterator[tuple[range, Any]]:
    """Streamed chunks; the copy of each to the device begins while the one before it runs."""
    rows = sharding.rows_here(spec.batch_size, mesh)
    extra_rows = {name: sharding.rows_here(batch_size, mesh) for name, batch_size in spec.extra}
    for steps, chunk in stream.train_chunks(images, spec, ranges, size, rows, extra_rows=extra_rows):
        yield steps, sharding.put_batch(chunk, mesh, axis=1)


def _device_chunks(
    images: stream.Images, spec: StreamSpec, ranges: Iterable[range], size: int, mesh: Mesh
) -> Iterator[tuple[range, Any]]:
    """The same batches, bit for bit, gathered on the device; only ids travel. Needs no TensorFlow."""
    parts = {"": (images, spec)} | {one.name: (images.extra[one.name], one) for one in spec.further}
    for own, _ in parts.values():
        if own.random:
            raise UserError(
                f"data.placement='device' keeps decoded images, but preprocess={own.preprocess!r} draws at random; "
                "use data.placement='host', or move the randomness to augment"
            )
    nbytes = sum(len(own) * (math.prod(own.shape) + 4 * len(own.target_names)) for own, _ in parts.values())
    count = sum(len(own) for own, _ in parts.values())
    memory.require(nbytes, f"data.placement='device': {count:,} decoded images")
    tables = {name: _table(own, mesh) for name, (own, _) in parts.items()}
    for steps in ranges:
        chunk = {name: {**_ids(own, one, steps, size, mesh), "table": tables[name]}
                 for name, (own, one) in parts.items()}  # fmt: skip
        yield steps, {**chunk.pop(""), **chunk}


def _table(images: stream.Images, mesh: Mesh) -> Any:
    everything = np.arange(len(images), dtype=np.int64)
    return sharding.put_replicated(_as_table(images.read(everything, everything), mesh), mesh)


def _ids(images: stream.Images, spec: StreamSpec, steps: range, size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The ids of the batches of these steps and, if the stream has them, the epochs, i32[size, rows] on the devices."""
    rows = sharding.rows_here(spec.batch_size, mesh)
    positions = stream.positions(steps, spec.batch_size, rows)
    own = {"id": [images.ids(seed, positions) for seed in spec.seeds]}
    if spec.with_ids:
        own["epoch"] = [images.epochs(positions)] * spec.num_seeds
    chunk = {k: stream.side_by_side(v, rows.size, size).astype(np.int32) for k, v in own.items()}
    return sharding.put_batch(chunk, mesh, axis=1)

"""The device mesh, and how arrays are sharded over it. A single device is the mesh of size one.

A batch is sharded over all axes of the mesh, the train state only over the axis `fsdp`: see `optim/partition.py`.
"""

import logging
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from imgclf_jax.core.errors import UserError, check_choice, reason
from imgclf_jax.core.typing import PyTree

log = logging.getLogger(__name__)

AXES = ("data", "fsdp")


def make_mesh(devices: list[jax.Device] | None = None, text: str = "data=-1") -> Mesh:
    """Makes the mesh of a text such as 'data=-1, fsdp=4' over `devices`, by default all devices of all hosts.

    An axis of size -1 takes the remaining devices. Raises UserError if the text does not parse or does not fit the
    number of devices.
    """
    devices = devices or jax.devices()
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        check_choice("axis of mesh", name, AXES)
        if not re.fullmatch(r"-1|[1-9]\d*", size) or name in sizes or (size == "-1" and -1 in sizes.values()):
            raise UserError(f"mesh={text!r}: name each axis once with its size, at most one -1: 'data=-1, fsdp=4'")
        sizes[name] = int(size)
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        raise UserError(f"mesh={text!r}: the sizes multiply to {fixed}, but the number of devices is "
                        f"{len(devices)}; an axis of size -1 takes those that remain")  # fmt: skip
    shape = [len(devices) // fixed if size < 0 else size for size in sizes.values()]
    try:  # as a ring, or along the axes of a torus; `jax.make_mesh`, except on v5e, refuses to split a physical axis
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as e:
        log.info("the devices keep their own order, since JAX has none for a mesh of %s: %s", shape, reason(e))
        arranged = np.array(devices).reshape(shape)
    return Mesh(arranged, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def make_inference_mesh(text: str) -> Mesh:
    """Makes the mesh over all devices for inference with a model trained on the mesh `text`: fsdp stays sharded."""
    return make_mesh(text="fsdp=-1" if "fsdp" in text else "data=-1")


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis, that of the examples, is split over all devices."""
    names = mesh.axis_names
    return NamedSharding(mesh, PartitionSpec(names if len(names) > 1 else names[0]))


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1, key: str = "batch_size") -> None:
    """Raises UserError, naming the config key `key`, unless the devices share each microbatch equally."""
    if batch_size % (parts := mesh.size * accumulate):
        by = f"{parts}, the microbatches (accumulate) times the devices" if accumulate > 1 else f"the {parts} devices"
        raise UserError(f"{key}={batch_size} is not divisible by {by}; {-(-batch_size // parts) * parts} is")


def round_up(batch_size: int, mesh: Mesh) -> int:
    """Rounds a batch size up to a multiple of the device count, for batches that are padded."""
    return -(-batch_size // mesh.size) * mesh.size


def rows_here(size: int, mesh: Mesh) -> np.ndarray:
    """The rows int64[b], ascending, of a batch of `size` examples that the devices of this process hold.

    They follow the order of the devices in the mesh, which need not be that of the processes. `size` is a multiple of
    the device count.
    """
    slices = sharded(mesh).addressable_devices_indices_map((size,)).values()
    edges = {index[0].indices(size)[:2] for index in slices if index}
    return np.concatenate([np.arange(*own, dtype=np.int64) for own in sorted(edges)])


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Makes global arrays, sharded by rows, of the rows of this process; the copy is asynchronous.

    `batch` is an array, or a pytree of arrays, whose numbers of rows may differ.
    """
    split = sharded(mesh)
    if split.is_fully_addressable:
        return jax.device_put(batch, split)

    def place(rows: np.ndarray) -> jax.Array:
        # Without a shape JAX refuses processes with different numbers of devices.
        size = len(rows) * mesh.size // len(split.addressable_devices)
        return jax.make_array_from_process_local_data(split, rows, (size, *rows.shape[1:]))

    return jax.tree.map(place, batch)


def put_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Replicates a pytree of arrays, which every process has, on all devices."""
    return jax.tree.map(lambda x: put(x, replicated(mesh)), tree)


def put(x: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
    """Makes a global array with this sharding of an array that every process has."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x)  # `device_put` would compare it between all processes
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fetch(x: ArrayLike) -> np.ndarray:
    """Fetches a whole global array to the host of every process. All processes call this."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))

"""One program over all devices: a mesh, and how arrays lie on it. A single device is the mesh of size one.

The images of a batch are split over all axes of the mesh. The state is whole on every device, but for what is split
over the axis `fsdp`, see `optim/partition.py`, and for the states of other seeds where there is an axis `seeds`.
"""

import contextlib
import logging
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from imgclf_jax.core.errors import UserError, reason, unknown
from imgclf_jax.core.typing import Batch, Function, PyTree, State

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "seeds")


def make_mesh(devices: list[jax.Device] | None = None, text: str = "data=-1") -> Mesh:
    """The mesh that a text such as 'data=-1, fsdp=4' names, over all devices of all hosts (or over those given).

    A size of -1 is what the other axes leave. Raises UserError for another text, and if the devices do not suffice.
    """
    devices = devices or jax.devices()
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise UserError(unknown("axis of mesh", name, AXES))
        if not re.fullmatch(r"-1|[1-9]\d*", size) or name in sizes or (size == "-1" and -1 in sizes.values()):
            raise UserError(f"mesh={text!r}: each axis once, with its size, one of them -1: 'data=-1, fsdp=4'")
        sizes[name] = int(size)
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        raise UserError(
            f"mesh={text!r}: there are {len(devices)} devices, and the sizes multiply to {fixed}; together they must "
            "be all devices, with a size of -1 for what the others leave"
        )
    shape = [len(devices) // fixed if size < 0 else size for size in sizes.values()]
    if len({"seeds", "fsdp"} & sizes.keys()) == 2:
        raise UserError(f"mesh={text!r}: seeds and fsdp do not go together: a seed's state is whole on its devices")
    return Mesh(_arranged(devices, shape), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _arranged(devices: list[jax.Device], shape: list[int]) -> np.ndarray:
    """The devices in the order that suits their network, as `jax.make_mesh` has it: a ring, or the axes of a torus.

    It is put together from the functions below `jax.make_mesh`, which itself refuses several TPU slices and, but for
    v5e, to split a physical axis. The first axis is split over slices, or hosts with GPUs, if it can be. A part of a
    pod for which JAX knows no order stays in that of `devices`.
    """
    slices = len({getattr(device, "slice_index", None) for device in devices})
    try:
        if slices > 1:
            inside, across = [shape[0] // slices, *shape[1:]], [slices, *[1] * (len(shape) - 1)]
            return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as e:
        log.info("the devices are in their own order, since JAX has no other for a mesh of %s: %s", shape, reason(e))
        return np.array(devices).reshape(shape)


def make_inference_mesh(text: str) -> Mesh:
    """The mesh over all devices here for a model trained on the mesh `text`: sharded parameters stay sharded.

    With as many devices as in training it is the same mesh, but for an axis `seeds`: each device then runs all seeds.
    """
    if "fsdp" not in text:
        return make_mesh()
    with contextlib.suppress(UserError):
        return make_mesh(text=text)
    return make_mesh(text="fsdp=-1")


def groups_of_seeds(num_seeds: int, mesh: Mesh) -> int:
    """In how many groups of devices the seeds lie, each with as many. Raises UserError if they do not divide."""
    groups: int = mesh.shape.get("seeds", 1)
    if num_seeds % groups:
        raise UserError(f"num_seeds={num_seeds} does not divide into the {groups} parts of the mesh's axis seeds")
    return groups


def over_seeds(here: Function, num_seeds: int, mesh: Mesh) -> Function:
    """The train step of all seeds, where each group of devices computes seeds of its own.

    `here` is `step.vmap_over_seeds` of a group's seeds. With one seed a group it is the train step of a single run,
    which avoids the grouped convolutions that `vmap` over seeds makes.
    """
    groups = groups_of_seeds(num_seeds, mesh)
    if groups == 1:
        return here

    def own(states: State, batch: Batch, *fixed: PyTree) -> PyTree:  # [seeds here, …], [b, seeds here, …]
        if num_seeds > groups:
            return here(states, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch), *fixed)
        one = here(jax.tree.map(lambda x: x.squeeze(0), states), jax.tree.map(lambda x: x.squeeze(1), batch), *fixed)
        return jax.tree.map(lambda x: x[None], one)

    by_group, of_batch = PartitionSpec("seeds"), PartitionSpec(None, "seeds")
    lies = NamedSharding(mesh, PartitionSpec("data" if "data" in mesh.shape else None, "seeds"))

    def of_all(states: State, batch: Batch, *fixed: PyTree) -> PyTree:
        batch = jax.tree.map(lambda x: x.reshape(-1, num_seeds, *x.shape[1:]), batch)
        grouped = jax.shard_map(own, mesh=mesh, in_specs=(by_group, of_batch, *[PartitionSpec()] * len(fixed)),
                                out_specs=by_group, axis_names={"seeds"}, check_vma=False)  # fmt: skip
        return grouped(states, jax.lax.with_sharding_constraint(batch, lies), *fixed)

    return of_all


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis split over the devices: that of the examples in a batch."""
    # Seeds last: a batch has the seeds' examples side by side, so that the groups that share them out are neighbours.
    names = tuple(sorted(mesh.axis_names, key="seeds".__eq__))
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, names if len(names) > 1 else names[0]))


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1, key: str = "batch_size") -> None:
    """Raises UserError unless every device gets the same number of examples, of each of a step's parts.

    `key` is the config key that says the size.
    """
    parts = mesh.size * accumulate
    if batch_size % parts:
        low = batch_size - batch_size % parts
        near = [str(b) for b in (low, low + parts) if b]
        by = (
            f"{parts}, the parts of a step (accumulate) times the devices" if accumulate > 1 else f"the {parts} devices"
        )
        raise UserError(f"{key}={batch_size} is not divisible by {by}; the nearest that are: {' and '.join(near)}")


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The least size from `batch_size` on that every device gets an equal share of, for batches that are padded."""
    return -(-batch_size // mesh.size) * mesh.size


def rows_here(size: int, mesh: Mesh) -> np.ndarray:
    """The places int64[b], ascending, of those of `size` examples that this process' devices get of a batch.

    By the order of the devices in the mesh, which need not be that of the processes. Raises UserError unless every
    device gets the same number.
    """
    if size % mesh.size:
        raise UserError(f"a batch of {size} is not divisible by the {mesh.size} devices")
    lies = sharded(mesh).addressable_devices_indices_map((size,)).values()
    edges = {index[0].indices(size)[:2] for index in lies if index}
    return np.concatenate([np.arange(*own, dtype=np.int64) for own in sorted(edges)])


def put_batch(batch: Batch, mesh: Mesh, axis: int = 0) -> Batch:
    """The rows of this process to global arrays, split over the devices along `axis`; the copy is asynchronous.

    `batch` holds arrays, or dicts of arrays with another number of rows.
    """
    split = sharded(mesh, axis)
    placed: Batch = jax.tree.map(lambda rows: jax.make_array_from_process_local_data(split, rows), batch)
    return placed


def put_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """A pytree of arrays that each process has, to arrays that are whole on every device."""
    return jax.tree.map(lambda x: put(x, replicated(mesh)), tree)


def put(x: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array that each process has, to a global array with this sharding."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    host = np.asarray(x)  # `device_put` would have the processes compare all of it
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fetch(x: ArrayLike) -> np.ndarray:
    """A global array to NumPy, whole in every process. All processes call this."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))

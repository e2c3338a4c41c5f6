"""One program over all devices: a mesh, and how arrays lie on it. A single device is the mesh of size one."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imgclf_jax.core.errors import UserError


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh, `data`, over all devices of all hosts (or over those given)."""
    return Mesh(np.array(devices or jax.devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device: parameters and optimizer state."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis split over the devices: that of the examples in a batch."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError unless every device gets the same number of examples, of each of a step's parts."""
    parts = mesh.size * accumulate
    if batch_size % parts:
        low = batch_size - batch_size % parts
        near = [str(b) for b in (low, low + parts) if b]
        by = (
            f"{parts}, the parts of a step (accumulate) times the devices" if accumulate > 1 else f"the {parts} devices"
        )
        raise UserError(f"batch_size={batch_size} is not divisible by {by}; the nearest that are: {' and '.join(near)}")


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The least size from `batch_size` on that every device gets an equal share of, for batches that are padded."""
    return -(-batch_size // mesh.size) * mesh.size


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, axis: int = 0) -> dict[str, Any]:
    """This host's examples to global arrays, split over the devices along `axis`; the copy is asynchronous."""
    sharding = sharded(mesh, axis)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}

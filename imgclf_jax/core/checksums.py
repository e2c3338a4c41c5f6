"""Checksums of sharded arrays, device by device: they find a flipped bit, and the device that holds it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imgclf_jax.core import tree
from imgclf_jax.core.once import once
from imgclf_jax.core.typing import Function, PyTree


class Checksums:
    """Computes a checksum of each device's part of each array of a pytree. Compiled once, on first use.

    `like` holds the shapes, dtypes and shardings over `mesh`. The checksum is the sum, modulo 2**32, of the elements'
    bits, each times an odd number that depends on its place: one flipped bit changes it for certain.
    """

    def __init__(self, like: PyTree, mesh: Mesh):
        named = tree.named_leaves(like)
        self.names = [name for name, _ in named]
        self._mesh, self._specs = mesh, tuple(x.sharding.spec for _, x in named)
        devices = list(mesh.devices.flat)
        self.devices = [str(device.id) for device in devices]
        # For each device and array, the first device that holds the same part of it.
        self._first = np.array([_first_holders(x.sharding.devices_indices_map(x.shape), devices) for _, x in named]).T

    @once
    def _compiled(self) -> Function:
        def of_device(*leaves: jax.Array) -> jax.Array:
            return jnp.stack([_checksum(x) for x in leaves])[None]

        of_all = jax.shard_map(of_device, mesh=self._mesh, in_specs=self._specs, check_vma=False,
                               out_specs=PartitionSpec(self._mesh.axis_names))  # fmt: skip
        return jax.jit(lambda state: of_all(*(x for _, x in tree.named_leaves(state))),
                       out_shardings=NamedSharding(self._mesh, PartitionSpec()))  # fmt: skip

    def __call__(self, state: PyTree) -> np.ndarray:
        """u32[devices, arrays], in the order of `devices` and `names`. All processes call this."""
        return np.asarray(self._compiled(state))

    def differing_replicas(self, sums: np.ndarray) -> np.ndarray:
        """bool[devices, arrays]: where a device's part is not that of the first device that holds the same part."""
        return sums != np.take_along_axis(sums, self._first, axis=0)

    def describe(self, wrong: np.ndarray) -> str:
        """The first arrays and devices where bool[devices, arrays] `wrong` holds, in words."""
        arrays, devices = np.flatnonzero(wrong.any(0)), np.flatnonzero(wrong.any(1))
        more = f" and {len(arrays) - 3} more" if len(arrays) > 3 else ""
        of = "" if len(self.devices) == 1 else f" on device {', '.join(self.devices[i] for i in devices)}"
        return f"{', '.join(self.names[i] for i in arrays[:3])}{more}{of}"


def _first_holders(parts: Mapping[jax.Device, object], devices: list[jax.Device]) -> list[int]:
    first: dict[str, int] = {}
    return [first.setdefault(str(parts[device]), i) for i, device in enumerate(devices)]


def _checksum(x: jax.Array) -> jax.Array:
    """u32[]: the checksum of an array of any dtype."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32))
    flat = bits.astype(jnp.uint32).reshape(-1)
    odd = 2 * jax.lax.iota(jnp.uint32, flat.size) + 1
    return jnp.sum(flat * odd, dtype=jnp.uint32)

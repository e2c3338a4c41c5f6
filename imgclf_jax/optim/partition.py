"""Sharding of the train state over the mesh axis `fsdp`: which arrays, and along which axis.

Fully sharded data parallelism (ZeRO; Rajbhandari et al. 2019, arXiv:1910.02054): every device trains on its own images
and keeps one shard of the parameters, the optimizer state and the weight averages. XLA inserts the collectives.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import PyTree
from imgclf_jax.optim import rules

_MIN_ELEMENTS = 2**14  # smaller arrays are replicated: communicating them costs more than it saves


def build(text: str, shapes: Mapping[str, tuple[int, ...]], parts: int) -> dict[str, int | None]:
    """The axis along which each parameter is sharded in `parts` shards, by path; None if it is replicated.

    `text` is the key `rules.shard`, a list of PATTERN=AXIS or PATTERN=none as in `rules`. Without a rule, arrays of
    2**14 elements or more are sharded along their largest divisible axis. The returned axes count from the end (-1 is
    the last), since optimizers may stack such arrays, [n, …]. Raises UserError for text that is no rule and for an axis
    that does not divide.
    """
    axes: dict[str, int | None] = {name: _largest_axis(shape, parts) for name, shape in shapes.items()}
    parsed = []
    for part in rules.split(text):
        pattern, _, value = (piece.strip() for piece in part.rpartition("="))
        if not pattern or not re.fullmatch(r"\d|none", value):
            raise UserError(f"rules.shard: {part!r} is not PATTERN=AXIS or PATTERN=none, such as 'head/kernel=0'")
        parsed.append((pattern, None if value == "none" else int(value)))
    for name, axis in rules.match(parsed, list(shapes), "rules.shard").items():
        shape = shapes[name]
        if axis is not None and (axis >= len(shape) or shape[axis] % parts):
            raise UserError(f"rules.shard: axis {axis} of {name}, {list(shape)}, does not divide into {parts} shards")
        axes[name] = axis
    return {name: None if axis is None else axis - len(shapes[name]) for name, axis in axes.items()}


def _largest_axis(shape: Sequence[int], parts: int) -> int | None:
    divisible = [i for i, n in enumerate(shape) if n % parts == 0]
    return max(divisible, key=lambda i: shape[i]) if divisible and math.prod(shape) >= _MIN_ELEMENTS else None


def state_shardings(state: PyTree, axes: Mapping[str, int | None], mesh: Mesh, leading: int = 0) -> PyTree:
    """The sharding of each array of a pytree of parameters, or of arrays of their shapes, such as Adam's moments.

    An array takes the axis of the longest parameter path that its own path ends with. `leading` axes precede the
    parameter's: the axis of the seeds.
    """

    def sharding(name: str, x: jax.ShapeDtypeStruct) -> NamedSharding:
        parts = name.split("/")
        axis = next((axes[end] for i in range(len(parts)) if (end := "/".join(parts[i:])) in axes), None)
        index = -1 if axis is None else len(x.shape) + axis
        if index < leading or x.shape[index] % mesh.shape["fsdp"]:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*[None] * index, "fsdp"))

    return tree.map_named(sharding, state)

"""Which arrays of a train state lie in parts on the devices, and along which axis: over the mesh's axis `fsdp`.

Fully sharded data parallelism (ZeRO; Rajbhandari et al. 2019, arXiv:1910.02054): every device trains on its own images
and keeps a part of the parameters, of the optimizer's state and of the averages. XLA gathers a parameter where it is
used, and scatters the sum of its gradients.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.optim import rules

WHAT = ("all", "optimizer")
_LEAST = 2**14  # elements; a smaller array is whole on every device: to send it takes longer than it saves


def build(text: str, shapes: Mapping[str, tuple[int, ...]], parts: int) -> dict[str, int | None]:
    """The axis of each parameter, by its path, that is split in so many parts; None for one that stays whole.

    Axes are counted from the last, which is -1, since an optimizer may keep several such arrays in one, [n, …].
    `text` is `rules.shard`, PATTERN=AXIS or PATTERN=none, see `rules`. Without a rule it is the largest axis that
    divides, of arrays from 2**14 elements on. Raises UserError for text that is no rule, and for an axis that does not
    divide.
    """
    found: dict[str, int | None] = {name: _largest(shape, parts) for name, shape in shapes.items()}
    given = []
    for part in rules.split(text):
        pattern, _, axis = (piece.strip() for piece in part.rpartition("="))
        if not pattern or not re.fullmatch(r"\d|none", axis):
            raise UserError(f"rules.shard: {part!r} is not PATTERN=AXIS or PATTERN=none, such as 'head/kernel=0'")
        given.append((pattern, None if axis == "none" else int(axis)))
    for name, chosen in rules.match(given, list(shapes), "rules.shard").items():
        shape = shapes[name]
        if chosen is not None and (chosen >= len(shape) or shape[chosen] % parts):
            raise UserError(f"rules.shard: axis {chosen} of {name}, {list(shape)}, does not divide into {parts} parts")
        found[name] = chosen
    return {name: None if axis is None else axis - len(shapes[name]) for name, axis in found.items()}


def _largest(shape: Sequence[int], parts: int) -> int | None:
    able = [i for i, n in enumerate(shape) if n % parts == 0]
    return max(able, key=lambda i: shape[i]) if able and math.prod(shape) >= _LEAST else None


def check_what(text: str) -> None:
    """Raises UserError unless `text` is a value of the key `shard`."""
    if text not in WHAT:
        raise UserError(unknown("shard", text, WHAT))


def state_shardings(state: Any, axes: Mapping[str, int | None], mesh: Mesh, what: str = "all", leading: int = 0) -> Any:
    """The sharding of each array of a pytree that holds parameters, or arrays of their shapes, such as moments.

    An array belongs to the parameter whose path its own ends with. With `what` "optimizer" only arrays below
    `opt_state` are split (ZeRO's first stage). `leading` axes come before the parameter's: that of the seeds, which is
    split over the mesh's axis `seeds` if it has one.
    """
    first = ("seeds",) if leading and "seeds" in mesh.shape else (None,) * leading

    def of(name: str, x: Any) -> NamedSharding:
        belongs = [path for path in axes if name == path or name.endswith("/" + path)]
        axis = axes[max(belongs, key=len)] if belongs else None
        place = -1 if axis is None else len(x.shape) + axis
        if place < leading or x.shape[place] % mesh.shape["fsdp"]:
            return NamedSharding(mesh, PartitionSpec(*first))
        if what == "optimizer" and "opt_state" not in name.split("/"):
            return NamedSharding(mesh, PartitionSpec(*first))
        return NamedSharding(mesh, PartitionSpec(*first, *[None] * (place - leading), "fsdp"))

    return tree.map_named(of, state)

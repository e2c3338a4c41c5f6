"""Counts of a compiled program: memory traffic, collectives and sizes."""

import math
from dataclasses import dataclass

import jax

from imgclf_jax.core.typing import PyTree
from imgclf_jax.tools.dryrun import traffic


@dataclass(frozen=True)
class Counts:
    """Counts of one step on one device."""

    bytes: float  # read from and written to the device's memory, after fusion
    collectives: dict[str, tuple[int, int]]  # kind → (count, bytes of the results)


def count_program(compiled: jax.stages.Compiled) -> Counts:
    """Counts a compiled program (see `traffic`): one step, with all microbatches of gradient accumulation."""
    module = traffic.Module(compiled.as_text() or "")
    return Counts(float(module.traffic()), module.collectives())


def bytes_per_device(tree: PyTree) -> int:
    """Returns the bytes per device of a pytree of arrays or `ShapeDtypeStruct` with shardings."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        total += math.prod(shape) * x.dtype.itemsize
    return total

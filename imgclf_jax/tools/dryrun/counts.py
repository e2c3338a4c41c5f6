"""Counts of a compiled program: sizes, and the collectives in its HLO text."""

import collections
import math
import re

import jax

from imgclf_jax.core.typing import PyTree

_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\((.*?)\)"
)
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collective_bytes(compiled: jax.stages.Compiled) -> dict[str, tuple[int, int]]:
    """Returns {kind: (count, bytes of the results)} of the collectives in a program; a loop's body counts once."""
    found = collections.defaultdict[str, tuple[int, int]](lambda: (0, 0))
    for result, kind, start, operands in _COLLECTIVE.findall(compiled.as_text() or ""):
        sizes = [math.prod(int(n) for n in shape.split(",") if n) * (int(bits) if bits else 8) // 8
                 for _, bits, shape in _ARRAY.findall(result)]  # fmt: skip
        n = operands.count("%")
        if start and len(sizes) >= 2 * n:  # an asynchronous start also returns its operands
            sizes = sizes[n : 2 * n]
        count, size = found[kind]
        found[kind] = count + 1, size + sum(sizes)
    return dict(found)


def bytes_per_device(tree: PyTree) -> int:
    """Returns the bytes per device of a pytree of arrays or `ShapeDtypeStruct` with shardings."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        total += math.prod(shape) * x.dtype.itemsize
    return total

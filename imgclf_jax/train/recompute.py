"""Finds silent data corruption by computing a step twice from the same state: the key `check_every`.

A step is a pure function of the state and of (seed, step), so two results differ only if a device computed wrongly, its
memory lost a bit, or a kernel is nondeterministic. In practice, recomputation finds such faults: arXiv:2502.12340.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import PyTree


def refuse_difference(step: int, first: PyTree, second: PyTree, latest: Callable[[], str]) -> None:
    """Raises UserError unless two results of step `step` agree in every bit, and in each result all replicas.

    Compares what the devices of this process hold. `latest` says where the run continues.
    """
    arrays, devices = find_differences(first, second)
    if arrays:
        raise UserError(f"step {step} gives other bits when it is computed again, in {', '.join(arrays[:3])}, on "
                        f"device {', '.join(map(str, devices))}: a device failed or lost a bit, or a kernel is not "
                        "deterministic; test the devices, then run the same command on others: it continues from "
                        f"{latest()}")  # fmt: skip


def find_differences(first: PyTree, second: PyTree) -> tuple[list[str], list[int]]:
    """The paths of the arrays that differ in a bit between two states or between replicas, and their devices' ids."""
    arrays, devices = [], set()
    for (name, a), (_, b) in zip(tree.named_leaves(first), tree.named_leaves(second), strict=True):
        replicas: dict[str, bytes] = {}
        wrong = set()
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
            own = _content(x.data)
            if not own == _content(y.data) == replicas.setdefault(str(x.index), own):
                wrong.add(x.device.id)
        arrays += [name] if wrong else []
        devices |= wrong
    return arrays, sorted(devices)


def _content(x: jax.Array) -> bytes:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()

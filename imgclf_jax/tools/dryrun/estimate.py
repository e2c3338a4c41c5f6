"""What a program's counts mean on a chip: the least time of a step, and what bounds it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from imgclf_jax.core import memory
from imgclf_jax.tools.dryrun.table import CHIPS, Chip
from imgclf_jax.tools.dryrun.topology import Chips


def chip_of(chips: Chips) -> Chip:
    """The published figures of a chip; those of `cpu` are of this machine, and measured now."""
    return CHIPS[chips.kind] if chips.kind != "cpu" else _this_cpu(chips.count)


def _this_cpu(devices: int) -> Chip:
    """Each of `devices` virtual devices has its share of what this machine's cores can do: the best of a few tries."""
    n = 1536
    a = np.ones((n, n), np.float32)
    flops = 2 * n**3 / min(_seconds(lambda: a @ a) for _ in range(5))
    x, y = np.ones(32 << 20, np.uint8), np.empty(32 << 20, np.uint8)
    bandwidth = 2 * x.size / min(_seconds(lambda: np.copyto(y, x)) for _ in range(5))  # read and written
    each = flops / devices
    share = (each, each, each, (memory.physical() or 0) / devices, bandwidth / devices)
    return Chip("cpu", *share, links=bandwidth / devices, network=0, a_host=devices, source="measured on this machine")


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Bound:
    """The least seconds of a step by each resource alone."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """The least that a step takes if the three overlap wholly."""
        return max(self.compute, self.memory, self.network)

    @property
    def by(self) -> str:
        """Which of them it is."""
        return max(("compute", "memory", "network"), key=lambda name: float(getattr(self, name)))


def peak(chip: Chip, precision: str, matmul_precision: str) -> float:
    """Operations a second of a run's products, by the config's keys of these names.

    `precision` "bfloat16" is of bfloat16 operands. With "float32" it is `matmul_precision` that says what becomes of
    them: as JAX has it, "bfloat16" is one product of bfloat16 on a TPU, and TensorFloat-32 on a GPU.
    """
    if precision == "bfloat16" or (matmul_precision == "bfloat16" and chip.platform == "tpu"):
        return chip.flops
    return chip.flops_float32 if matmul_precision == "float32" else chip.flops_tensorfloat32


def bound(
    chip: Chip, chips: int, peak: float, flops: float, traffic: float, collectives: dict[str, tuple[int, int]]
) -> Bound:
    """Of one step: `flops` at `peak` and bytes of `traffic` on a device; its collectives, kind → (how many, bytes)."""
    network = sum(_collective_seconds(chip, chips, kind, size) for kind, (_, size) in collectives.items())
    return Bound(flops / peak, traffic / chip.bandwidth, network)


def _collective_seconds(chip: Chip, chips: int, kind: str, size: int) -> float:
    """Of a result of `size` bytes, by the ring algorithms, whose chips send (n - 1) / n of the whole once or twice.

    Over several hosts an all-reduce is one scattered inside of each host, summed between hosts by parts, and gathered.
    """
    if chips == 1:
        return 0.0
    times = {"all-reduce": 2, "reduce-scatter": chips}.get(kind, 1)  # of a scatter `size` is that of a part
    if not chip.network or chips <= chip.a_host:
        return times * size * (chips - 1) / chips / chip.links
    hosts = -(-chips // chip.a_host)
    inside = times * size * (chip.a_host - 1) / chip.a_host / chip.links
    return inside + times * size / chip.a_host * (hosts - 1) / hosts / chip.network

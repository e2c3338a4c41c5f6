"""A roofline estimate: the shortest time of a step on a chip, and its bottleneck."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from imgclf_jax.core import memory
from imgclf_jax.tools.dryrun.table import CHIPS, Chip
from imgclf_jax.tools.dryrun.topology import Chips


def chip_figures(chips: Chips) -> Chip:
    """Returns the published figures of a chip, or measures those of this machine for `cpu`.

    For GPUs `a_host` is that of the topology.
    """
    if chips.kind == "cpu":
        return _this_cpu(chips.count)
    chip = CHIPS[chips.kind]
    return replace(chip, a_host=chips.shape[-1]) if chips.platform == "gpu" else chip


def _this_cpu(devices: int) -> Chip:
    """Measures this machine, best of a few tries, and divides it among `devices` virtual devices."""
    n = 1536
    a = np.ones((n, n), np.float32)
    flops = 2 * n**3 / min(_seconds(lambda: a @ a) for _ in range(5))
    x, y = np.ones(32 << 20, np.uint8), np.empty(32 << 20, np.uint8)
    bandwidth = 2 * x.size / min(_seconds(lambda: np.copyto(y, x)) for _ in range(5))  # read and written
    each = flops / devices
    share = (each, each, each, memory.physical() / devices, bandwidth / devices)
    return Chip("cpu", *share, links=bandwidth / devices, network=0, a_host=devices, source="measured on this machine")


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Bound:
    """The shortest time of a step, in seconds, by each resource."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """The time of a step if the three overlap completely."""
        return max(self.compute, self.memory, self.network)

    @property
    def by(self) -> str:
        """The bottleneck: "compute", "memory" or "network"."""
        return max(("compute", "memory", "network"), key=lambda name: float(getattr(self, name)))


def peak(chip: Chip, precision: str, matmul_precision: str) -> float:
    """Returns the peak matmul FLOP/s for the config's `precision` and `matmul_precision`.

    With `precision` "float32", `matmul_precision` applies: "bfloat16" is one bfloat16 pass on a TPU, and TensorFloat-32
    on a GPU.
    """
    if precision == "bfloat16" or (matmul_precision == "bfloat16" and chip.platform == "tpu"):
        return chip.flops
    return chip.flops_float32 if matmul_precision == "float32" else chip.flops_tensorfloat32


def bound(
    chip: Chip, chips: int, peak: float, flops: float, traffic: float, collectives: dict[str, tuple[int, int]]
) -> Bound:
    """Bounds one step, given a device's `flops`, `peak` FLOP/s, bytes of `traffic`, and collectives by kind."""
    network = sum(_collective_seconds(chip, chips, kind, size) for kind, (_, size) in collectives.items())
    return Bound(flops / peak, traffic / chip.bandwidth, network)


def _collective_seconds(chip: Chip, chips: int, kind: str, size: int) -> float:
    """Returns the time of a ring collective with a result of `size` bytes: each chip sends (n - 1) / n once or twice.

    An all-reduce over several hosts is a reduce-scatter within hosts, an all-reduce between hosts, and an all-gather.
    """
    if chips == 1:
        return 0.0
    times = {"all-reduce": 2, "reduce-scatter": chips}.get(kind, 1)  # a reduce-scatter's `size` is one shard
    if not chip.network or chips <= chip.a_host:
        return times * size * (chips - 1) / chips / chip.links
    hosts = -(-chips // chip.a_host)
    inside = times * size * (chip.a_host - 1) / chip.a_host / chip.links
    return inside + times * size / chip.a_host * (hosts - 1) / hosts / chip.network

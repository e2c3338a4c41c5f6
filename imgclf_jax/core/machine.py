"""The processor and memory of the machine, and how much of them its control groups (a container, a job) leave."""

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path

from imgclf_jax.core.errors import UserError

_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory() -> int:
    """The bytes that this process may use: the machine's memory, or its limit if that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min([machine, *(limit for limit, *_ in _limits("memory", "memory.max", "memory.limit_in_bytes"))]))


def cores() -> int:
    """The processors in this process's affinity mask, where the system has one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processors() -> int:
    """The processors that this process may use at once: `cores`, or its group's share of time, rounded up, if less."""
    quotas, periods = (_limits("cpu", "cpu.max", f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    shares = [quota[0] / period[-1] for quota, period in zip(quotas, periods, strict=False)]
    return math.ceil(min([cores(), *(share for share in shares if share > 0)]))  # -1 and "max" are no limit


def _limits(controller: str, new: str, old: str) -> Iterator[list[float]]:
    """Yields the numbers in a file of this process's group and of those above: `new` in version 2, `old` in 1."""
    with contextlib.suppress(OSError):
        for line in _OWN.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            folder = (_ROOT / controller if controllers else _ROOT) / group.strip("/")
            for one in (folder, *folder.parents):  # in a container the group may have another path, or none
                with contextlib.suppress(OSError, ValueError):
                    text = (one / (old if controllers else new)).read_text()
                    yield [float(word) for word in text.replace("max", "inf").split()]


def cpu_facts() -> dict[str, str]:
    """The entries of Linux's /proc/cpuinfo for the first core; {} without this file."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    return found


def cpu_flags() -> frozenset[str]:
    """The instruction set extensions of an x86 or Arm processor; empty if unknown."""
    facts = cpu_facts()
    return frozenset(facts.get("flags", facts.get("Features", "")).split())


def keep_freed_memory() -> None:
    """Makes glibc's allocator keep freed memory: to fault tens of megabytes in again takes as long as a step on CPU.

    All threads share the main arena: the others hold at most 64 MB, and larger arrays are mapped anew at each step, a
    fifth of the time of training ResNet-20. Above 256 MB they are mapped all the same: between the fragments of the
    heap they found no place, and training ViT-S at 224 pixels took 3.4 instead of 1.8 GB.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt, trim_threshold, mmap_threshold, arena_max = ctypes.CDLL(None).mallopt, -1, -3, -8
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**28)
        if "MALLOC_ARENA_MAX" not in os.environ and "arena_max" not in os.environ.get("GLIBC_TUNABLES", ""):
            mallopt(arena_max, 1)


def require_memory(nbytes: int, what: str) -> None:
    """Raises UserError if `what` needs more bytes than this process may use."""
    if nbytes > (most := memory()):
        raise UserError(f"{what} needs {format_bytes(nbytes)} of memory, but this process may use {format_bytes(most)}")


def format_bytes(nbytes: int) -> str:
    """A human-readable number of bytes: '1.5 GB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000  # type: ignore[assignment]
    return f"{nbytes:,.0f} TB"

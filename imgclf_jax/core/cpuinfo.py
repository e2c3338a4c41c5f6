"""What Linux says about the processor, in /proc/cpuinfo; elsewhere nothing is known."""

import contextlib
from pathlib import Path


def facts() -> dict[str, str]:
    """The entries of /proc/cpuinfo for the first core; {} without this file."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    return found


def flags() -> frozenset[str]:
    """The instruction set extensions of an x86 or Arm processor; empty if unknown."""
    entries = facts()
    return frozenset(entries.get("flags", entries.get("Features", "")).split())


def lacks_bfloat16() -> bool:
    """Whether the processor has no bfloat16 instructions, so that bfloat16 layers are slow; False if unknown."""
    found = flags()
    return bool(found) and found.isdisjoint({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})

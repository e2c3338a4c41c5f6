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

"""The limits of a container or of a cluster's job, in files as Linux has them."""

import os

import pytest

from imgclf_jax.core import machine

FREE = str(2**63 - 4096)  # what version 1 says without a limit
CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("files", "memory", "processors"), [
    ({"own": "0::/job/step\n", "memory.max": "max\n", "job/memory.max": "1000000\n", "job/cpu.max": "50000 100000\n"},
     10**6, 1),
    ({"own": "0::/\n", "memory.max": "3000000\n", "cpu.max": "max 100000\n"}, 3 * 10**6, CORES),
    ({"own": "4:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n0::/b\n", "memory/memory.limit_in_bytes": "2000000\n",
     "cpu/cpu.cfs_quota_us": "10000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2 * 10**6, 1),
    ({"own": "4:memory:/\n3:cpu:/\n", "memory/memory.limit_in_bytes": FREE, "cpu/cpu.cfs_quota_us": "-1\n",
     "cpu/cpu.cfs_period_us": "100000\n"}, None, CORES),
    ({}, None, CORES),  # no Linux
], ids=["v2 above", "v2 container", "v1 container", "v1 free", "none"])  # fmt: skip
def test_limits(tmp_path, monkeypatch, files, memory, processors):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    monkeypatch.setattr(machine, "_OWN", tmp_path / "own")
    assert machine.memory() == (memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    assert machine.processors() == processors

"""The limits and the processes that a container or a cluster gives, in files and variables as Linux has them."""

import os
import socket

import jax
import pytest

from imgclf_jax.core import machine, processes
from imgclf_jax.core.errors import UserError

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


CLUSTERS = (*processes._COUNTS, *processes._SIGNS, "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    for name in (*CLUSTERS, "SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda _: None)


@pytest.mark.parametrize(("environment", "several"), [
    ({}, False),
    ({"SLURM_NTASKS": "4"}, False),  # a batch script
    ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),  # the shell of `salloc`
    ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),  # `srun`
    ({"OMPI_COMM_WORLD_SIZE": "1"}, False), ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"JOB_COMPLETION_INDEX": "0"}, True), ({"TPU_WORKER_ID": "1"}, True),
])  # fmt: skip
def test_a_cluster_is_asked_if_there_is_one(monkeypatch, environment, several):
    asked = []

    def initialize(*args, **kwargs):
        asked.append(args)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.start()
    assert bool(asked) == several
    assert (processes.count(), processes.index()) == (1, 0)
    asked.clear()
    processes.start(number=1)  # alone, whatever the cluster says
    assert not asked


@pytest.mark.parametrize(
    ("tasks", "alone"), [("1", True), ("1(x4)", True), ("2", False), ("2(x3)", False), ("1(x2),2", False), ("", False)]
)
def test_the_only_process_of_a_host_takes_all_its_devices(monkeypatch, tasks, alone):
    """Under Slurm and Open MPI, JAX would give it only one device."""
    if tasks:
        monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    assert processes.started_one_here() == alone


def test_a_port_in_use_is_refused_in_a_sentence():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=r"cannot join .Address already in use.*a free port"):
            processes.start(f"localhost:{port}", 2, 0)

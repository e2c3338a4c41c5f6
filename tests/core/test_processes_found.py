"""The processes that a cluster started, by the environment variables."""

import socket

import jax
import pytest

from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError

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

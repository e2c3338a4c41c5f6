"""The processes that a cluster started, by the environment variables, and how they end together."""

import types

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

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    monkeypatch.setattr(processes, "_end_with_status_1", lambda: None)
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


def test_a_day_without_an_event_is_not_the_end_of_events(monkeypatch):
    """The watching thread used to end, so that a signal to one process was never heard of by the others."""
    event = '{"kind": "stop", "process": 1, "text": "SIGTERM", "status": 0}'
    answers = [RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out"), event, RuntimeError("UNAVAILABLE: gone")]

    def get(key, milliseconds):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(processes, "stops", [])
    processes._watch(types.SimpleNamespace(blocking_key_value_get=get))
    assert processes.stops == [("SIGTERM", 1)]
    assert not answers


def test_processes_that_cannot_join_are_told_how(monkeypatch):
    def initialize(*args, **kwargs):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    monkeypatch.setattr(processes, "_end_with_status_1", lambda: None)
    monkeypatch.setattr(processes.rendezvous, "meet", lambda *_: None)
    with pytest.raises(processes.UserError, match=r"cannot join \(DEADLINE.*within 7 s.*a free port of the host of"):
        processes.start("a:1", 2, 0, patience=7)


def test_a_collective_that_fails_since_another_process_died_is_explained(monkeypatch):
    """Gloo's error may come before the coordination service misses the process; it was a traceback."""
    lost = "UNKNOWN: Gloo all-reduce failed: [gloo/transport/tcp/pair.cc:538] Read error: Connection reset by peer"
    told = []
    monkeypatch.setattr(processes, "_count", 2)
    monkeypatch.setattr(processes, "_hosts", ["host a", "host b"])
    monkeypatch.setattr(processes, "_failure", "")
    monkeypatch.setattr(processes, "tell", lambda *event: told.append(event))
    with (
        pytest.raises(
            UserError, match=r"^process 0 \(host a\): another process of this run has died .* \(UNKNOWN: Gloo"
        ),
        processes.ending_together(),
    ):
        raise jax.errors.JaxRuntimeError(lost)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"), processes.ending_together():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert [kind for kind, *_ in told] == ["end", "end"]

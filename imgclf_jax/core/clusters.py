"""What a cluster tells the processes that it starts, in their environment."""

import importlib.util
import os

# What clusters set for a process that is one of several. On Cloud TPU it is the machine that JAX asks. JAX itself reads
# SLURM_NTASKS, which a shell in an allocation has too: there a process would wait for others that nobody starts.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_SIGNS = ("JOB_COMPLETION_INDEX", "TPU_WORKER_ID", "MEGASCALE_COORDINATOR_ADDRESS", "JAX_COORDINATOR_ADDRESS")


def has_started_several() -> bool:
    """Whether this process is one of several that a cluster has started, as far as the environment tells."""
    several = any(os.environ.get(name, "1") != "1" for name in _COUNTS)
    return several or any(name in os.environ for name in _SIGNS) or bool(importlib.util.find_spec("libtpu"))


def started_one_here() -> bool:
    """Whether the cluster started one process here. JAX would give it one device, and the others would idle."""
    here = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""))
    return here.partition("(")[0] == "1" and "," not in here

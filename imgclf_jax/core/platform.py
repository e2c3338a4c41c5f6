"""The platform that a program is traced for, "cpu", "gpu" or "tpu": a context that tracing enters.

It comes from the devices of the mesh, and not from the machine that traces. So the program of any platform can be
traced, lowered, exported and compiled on any machine.
"""

import functools
from contextlib import AbstractContextManager

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr
from jax.sharding import AbstractMesh, Mesh

from imgclf_jax.core import jaxprs
from imgclf_jax.core.typing import Function, PyTree

# The platform and `compute_capability`: parts of the key of JAX's caches of what was traced.
_traced_for = jax.make_user_context(("", 0.0))


def current() -> str:
    """The platform that is traced for; "" outside of `tracing_for`, where layers take the form that runs everywhere."""
    platform: str = _traced_for.value[0]
    return platform


def compute_capability() -> float:
    """The least CUDA compute capability of the GPUs that are traced for, such as 8.0; 0 where it is not known."""
    capability: float = _traced_for.value[1]
    return capability


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """The platform of the devices of a mesh, which may be described only (`AbstractMesh` with an `AbstractDevice`)."""
    device = mesh.abstract_device if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]
    return "gpu" if device.platform in ("cuda", "rocm") else str(device.platform)


def compute_capability_of(mesh: Mesh | AbstractMesh) -> float:
    """The least CUDA compute capability of the mesh's devices; 0 unless all of them are GPUs of this run."""
    if isinstance(mesh, AbstractMesh) or platform_of(mesh) != "gpu" or not {*mesh.devices.flat} <= {*jax.devices()}:
        return 0.0
    return min(float(getattr(device, "compute_capability", 0)) for device in mesh.devices.flat)


def tracing_for(platform: str, compute_capability: float = 0.0) -> AbstractContextManager[None]:
    """What is traced inside is for `platform`, and for GPUs of at least this `compute_capability`."""
    context: AbstractContextManager[None] = _traced_for((platform, compute_capability))
    return context


def traced_for(platform: str, function: Function) -> Function:
    """`function`, whose tracing enters `tracing_for(platform)`, in whatever thread it takes place."""

    @functools.wraps(function)
    def traced(*args: object, **kwargs: object) -> PyTree:
        with tracing_for(platform):
            return function(*args, **kwargs)

    return traced


def cpu_barrier(x: PyTree) -> PyTree:
    """The pytree x. On CPU it is computed by itself, and not fused into what reads it; elsewhere XLA decides."""
    return lax.optimization_barrier(x) if current() == "cpu" else x


def slow_in_loops(jaxpr: ClosedJaxpr, platform: str) -> bool:
    """Whether a program holds an operation that is slow inside of a loop on this platform.

    On CPU that is XLA's own convolution: with its gradients it takes up to a hundred times as long there.
    """
    return platform == "cpu" and jaxprs.holds(jaxpr, "conv_general_dilated")

"""The platform that a program is traced for, "cpu", "gpu" or "tpu": a context that tracing enters.

It comes from the devices of the mesh, and not from the machine that traces. So the program of any platform can be
traced, lowered, exported and compiled on any machine.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from imgclf_jax.core import jaxprs

_traced_for = jax.make_user_context("")  # a part of the key of JAX's caches of what was traced


def current() -> str:
    """The platform that is traced for; "" outside of `tracing_for`, where layers take the form that runs everywhere."""
    platform: str = _traced_for.value
    return platform


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """The platform of the devices of a mesh, which may be described only (`AbstractMesh` with an `AbstractDevice`)."""
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    return "gpu" if device.platform in ("cuda", "rocm") else str(device.platform)


def tracing_for(platform: str) -> AbstractContextManager[None]:
    """What is traced inside is for `platform`."""
    context: AbstractContextManager[None] = _traced_for(platform)
    return context


def traced_for(platform: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose tracing enters `tracing_for(platform)`, in whatever thread it takes place."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with tracing_for(platform):
            return function(*args, **kwargs)

    return traced


def cpu_barrier(x: Any) -> Any:
    """The pytree x. On CPU it is computed by itself, and not fused into what reads it; elsewhere XLA decides."""
    return lax.optimization_barrier(x) if current() == "cpu" else x


def slow_in_loops(jaxpr: Any, platform: str) -> bool:
    """Whether a program holds an operation that is slow inside of a loop on this platform.

    On CPU that is XLA's own convolution: with its gradients it takes up to a hundred times as long there.
    """
    return platform == "cpu" and jaxprs.holds(jaxpr, "conv_general_dilated")

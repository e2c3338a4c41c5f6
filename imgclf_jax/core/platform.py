"""The platform that a program is traced for, "cpu", "gpu" or "tpu": a context that tracing enters.

It comes from the devices of the mesh, and not from the machine that traces. So the program of any platform can be
traced, lowered, exported and compiled on any machine.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from jax import lax
from jax.sharding import Mesh

_traced_for: ContextVar[str] = ContextVar("traced_for", default="")


def current() -> str:
    """The platform that is traced for; "" outside of `tracing_for`, where layers take the form that runs everywhere."""
    return _traced_for.get()


def of(mesh: Mesh) -> str:
    """The platform of the devices of a mesh."""
    platform = mesh.devices.flat[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """What is traced inside is for `platform`."""
    token = _traced_for.set(platform)
    try:
        yield
    finally:
        _traced_for.reset(token)


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

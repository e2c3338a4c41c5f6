"""The platform that a program is traced for, "cpu", "gpu" or "tpu", as a context that tracing enters.

It is that of the mesh's devices, not of the machine that traces. So any machine can trace, lower, export and compile
the program of any platform.
"""

import contextlib
import functools
import platform as host
from collections.abc import Iterator

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from imgclf_jax.core import internals
from imgclf_jax.core.typing import PyTree

# XLA compiler options. YNNPACK would take matmuls from oneDNN, and its fused sums give NaN in bfloat16 (jaxlib 0.12.0).
ONEDNN_OPTIONS: dict[str, bool | str] = {
    "xla_cpu_experimental_onednn_custom_call": True,
    "xla_cpu_experimental_ynn_fusion_type": "",
}

# The platform, `compute_capability` and `uses_onednn`. A user context is part of the key of JAX's tracing caches.
_traced_for = jax.make_user_context(("", 0.0, False))


def current() -> str:
    """The platform being traced for; "" outside of `tracing_for`, where layers take the form that runs everywhere."""
    return str(_traced_for.value[0])


def compute_capability() -> float:
    """The lowest CUDA compute capability of the GPUs being traced for, such as 8.0; 0 if unknown."""
    return float(_traced_for.value[1])


def uses_onednn() -> bool:
    """Whether oneDNN computes the convolutions and matmuls of the program being traced, on CPU."""
    return bool(_traced_for.value[2])


@functools.cache
def has_onednn() -> bool:
    """Whether this jaxlib accepts the options `ONEDNN_OPTIONS`; its builds for x86 contain oneDNN."""
    if host.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        jax.jit(lambda x: x, compiler_options=ONEDNN_OPTIONS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # XLA drops experimental options without notice
        return False
    return True


def init_options(platform: str) -> dict[str, bool | str | int] | None:
    """The compiler options of an initialization for `platform`.

    On CPU LLVM's highest level, 3, takes up to two seconds for each array of random numbers, most of a minute for
    ResNet-20, and gives the same bits as level 2.
    """
    if platform != "cpu" or jax.config.read("jax_disable_most_optimizations"):  # which means level 0
        return None
    return {"xla_backend_optimization_level": 2}


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """The platform of a mesh's devices; an `AbstractMesh` needs an `AbstractDevice`."""
    device = mesh.abstract_device if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]
    return "gpu" if device.platform in ("cuda", "rocm") else str(device.platform)


def compute_capability_of(mesh: Mesh | AbstractMesh) -> float:
    """The lowest CUDA compute capability of the mesh's devices; 0 unless all of them are GPUs of this run."""
    if isinstance(mesh, AbstractMesh) or platform_of(mesh) != "gpu" or not {*mesh.devices.flat} <= {*jax.devices()}:
        return 0.0
    return min(float(getattr(device, "compute_capability", 0)) for device in mesh.devices.flat)


@contextlib.contextmanager
def tracing_for(platform: str, compute_capability: float = 0.0, onednn: bool = False) -> Iterator[None]:
    """Inside, programs are traced for `platform`, and for GPUs of at least this `compute_capability`; also a decorator.

    With `onednn` they are CPU programs of plain XLA operations, compiled with `ONEDNN_OPTIONS`.
    """
    internals.keep_matmuls_apart()
    with _traced_for((platform, compute_capability, onednn)):
        yield


def cpu_barrier(x: PyTree) -> PyTree:
    """Returns the pytree x. On CPU, XLA does not fuse its computation into that of its readers."""
    return lax.optimization_barrier(x) if current() == "cpu" else x

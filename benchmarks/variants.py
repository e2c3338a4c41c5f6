"""The measured variants of this project and its peers; each runs in a separate worker process.

A variant's module has `device()`, the name of its device, and `open_variant(network, **options)`, which returns a
function `prepare(examples, mode, batch_size)`. That compiles, warms up and returns `measure(seconds)`, which returns
the images (or FLOPs) done and the seconds taken until the device was idle again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Measure = Callable[[float], tuple[float, float]]  # seconds → (images done, seconds taken)
Prepare = Callable[[tuple[np.ndarray, np.ndarray], str, int], Measure]


@dataclass(frozen=True)
class Variant:
    """One way to train and run a network."""

    module: str
    options: dict[str, Any]
    packages: tuple[str, ...]  # whose versions are reported
    builder: str = "model"  # the field of a Network that it runs
    precision: str = "float32"
    own: bool = False  # this project's, whose launch.py sets the environment
    modes: tuple[str, ...] = ("train", "infer")
    unit: str = "images"
    environment: dict[str, str] = field(default_factory=dict)


_JAX, _LINEN = ("jax", "jaxlib"), ("flax", "optax", "jax", "jaxlib")
_BACKENDS = {"tensorflow": ("tensorflow-cpu", "tensorflow"), "jax": _JAX, "torch": ("torch",)}

# The placement of images affects only training, so inference is measured once per precision.
OWN = {
    f"imgclf_jax {placement} {precision}": Variant(
        "own", {"placement": placement, "precision": precision}, ("imgclf_jax", *_JAX, "flax", "optax"),
        precision=precision, own=True, modes=("train", "infer") if placement == "host" else ("train",),
    )
    for placement in ("host", "device")
    for precision in ("float32", "bfloat16")
}  # fmt: skip

PEERS = {
    **{
        f"keras {backend}": Variant(
            "peers.on_keras", {}, ("keras", *packages), "keras", environment={"KERAS_BACKEND": backend}
        )
        for backend, packages in _BACKENDS.items()
    },
    **{
        f"torch {kind} {precision}": Variant(
            "peers.on_torch", {"compiled": kind == "compile", "precision": precision}, ("torch",), "torch", precision
        )
        for kind in ("eager", "compile")
        for precision in ("float32", "bfloat16")
    },
    **{
        f"{engine} {precision}": Variant(
            "peers.on_onnx", {"engine": engine, "precision": precision}, (engine, "torch"), "torch", precision,
            modes=("infer",),
        )
        for engine, precision in (("onnxruntime", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"))
    },
    **{
        f"linen loop {precision}": Variant("peers.on_linen", {"precision": precision}, _LINEN, "linen", precision)
        for precision in ("float32", "bfloat16")
    },
    "linen loop apart": Variant("peers.on_linen", {"apart": True}, _LINEN, "linen", modes=("infer",)),
}  # fmt: skip

PEAK = "matmul peak"
MEASURED = {**OWN, **PEERS, PEAK: Variant("peak", {}, _JAX, own=True, modes=("float32", "bfloat16"), unit="flops")}

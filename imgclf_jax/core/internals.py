"""Internals of other libraries that have no public name. Nothing else in the package imports private modules.

`tests/core/test_internals.py` fails when a new version of a library changes one of these.
"""

import functools
import os
import pickle
from contextlib import AbstractContextManager
from typing import Any

PythonUnpickler: Any = pickle._Unpickler  # it has a table of its opcodes; the public one is C, and has not


def coordination_state() -> Any:
    """JAX's connection to its coordination service: `client` (a key-value store), `num_processes` and `process_id`.

    Orbax takes the client from the same place, since `jax.distributed` exports only `initialize` and `shutdown`.
    """
    from jax._src import distributed

    return distributed.global_state


def not_cached() -> AbstractContextManager[None]:
    """Inside, this thread's compilations are not written to JAX's persistent compilation cache.

    Serializing a program with a oneDNN call crashes jaxlib 0.12. JAX's public setting is global: other threads
    would lose the cache too, or turn it back on in between.
    """
    from jax._src import config

    return config.persistent_cache_min_compile_time_secs(float("inf"))


@functools.cache
def keep_matmuls_apart() -> None:
    """Puts a barrier behind each matmul and convolution that JAX lowers for CPU, so that XLA fuses none with a reader.

    Of `silu(y) + y`, jaxlib 0.12 fuses the activation into oneDNN's matmul y and adds the result to itself; in bfloat16
    its YNNPACK fusions of matmuls and sums give NaN. A lowering rule covers every program, also gradients and loops.
    """
    from jax import lax
    from jax._src.interpreters import mlir
    from jax.extend.core import Primitive
    from jaxlib.mlir.dialects import stablehlo

    def register(primitive: Primitive) -> None:
        entry = mlir._platform_specific_lowerings["cpu"].get(primitive) or mlir._lowerings[primitive]

        def lower(context: Any, *operands: Any, **params: Any) -> Any:
            if primitive is lax.dot_general_p and len(params["dimension_numbers"][0][0]) > 1:
                # The gradient of a dense layer's kernel transposes its operands: XLA would compute them again for it.
                operands = stablehlo.OptimizationBarrierOp(operands).results
            return stablehlo.OptimizationBarrierOp(entry.rule(context, *operands, **params)).results

        mlir.register_lowering(primitive, lower, platform="cpu")

    register(lax.dot_general_p)
    register(lax.conv_general_dilated_p)


@functools.cache
def teach_orbax_s3() -> None:
    """Makes Orbax write arrays to `s3://`, as it does to `gs://`. It would write them to a local folder named `s3:`.

    TensorStore has an S3 driver, but Orbax has no option to choose the driver.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    is_gs, gs_spec = tensorstore_utils._use_gcs_driver, gcs_utils.get_kvstore_for_gcs
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith("s3:/") or is_gs(path)
    gcs_utils.get_kvstore_for_gcs = lambda path: _s3_spec(path) if path.startswith("s3:/") else gs_spec(path)


def _s3_spec(path: str) -> dict[str, str]:
    """TensorStore's spec of `s3:/BUCKET/NAME` (Orbax normalizes the slashes), at AWS_ENDPOINT_URL if that is set."""
    bucket, _, name = path.removeprefix("s3:").lstrip("/").partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return {"driver": "s3", "bucket": bucket, "path": name, **({"endpoint": endpoint} if endpoint else {})}

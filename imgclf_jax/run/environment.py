"""Sets the environment of the process before JAX and TensorFlow are imported."""

import contextlib
import os
import platform
import zlib

from imgclf_jax.core import machine, paths


def prepare(deterministic: bool = False) -> None:
    """Sets environment variables that JAX and TensorFlow read at import; the user's values take precedence.

    XLA reads its flags later, when JAX first needs devices. So `deterministic` still takes effect until then.
    """
    flags = {"xla_cpu_prefer_vector_width": "512"}  # if the processor has them; XLA by default uses half the width
    if deterministic:
        flags["xla_gpu_deterministic_ops"] = "true"
    own = os.environ.get("XLA_FLAGS", "")
    added = [f"--{name}={value}" for name, value in flags.items() if name not in own]
    os.environ["XLA_FLAGS"] = " ".join([*own.split(), *added])
    # The compilation cache is per kind of processor, since machines may share a home folder, and per number of cores:
    # XLA shares a program's loops out among them when it compiles it, and JAX's key does not have them.
    model = machine.cpu_facts().get("model name", platform.processor())
    kind = " ".join([model, *sorted(machine.cpu_flags()), str(machine.cores())])
    compiled = paths.cache_folder(f"compiled-{zlib.crc32(kind.encode()):08x}")
    with contextlib.suppress(OSError):  # without a folder, nothing is cached
        compiled.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    machine.keep_freed_memory()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # TensorFlow carries batches and computes nothing

"""The environment of a process, before JAX and TensorFlow are imported."""

import contextlib
import ctypes
import os
import platform
import zlib
from pathlib import Path

from imgclf_jax.run import cache


def prepare(deterministic: bool = False) -> None:
    """Sets what JAX and TensorFlow read when they are imported. What the user has set stands.

    XLA reads its flags later, when JAX is first asked for devices: until then `deterministic` may be asked for.
    """
    flags = {"xla_cpu_prefer_vector_width": "512"}  # of those that the processor has; XLA's own choice is half of it
    if deterministic:
        flags["xla_gpu_deterministic_ops"] = "true"
    own = os.environ.get("XLA_FLAGS", "")
    added = [f"--{name}={value}" for name, value in flags.items() if name not in own]
    os.environ["XLA_FLAGS"] = " ".join([*own.split(), *added])
    # Programs compiled once are kept, by kind of processor since a home folder may be shared by several.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    kind = "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    compiled = cache.folder(f"compiled-{zlib.crc32(kind.encode()):08x}")
    with contextlib.suppress(OSError):  # without a place to keep them they are compiled anew
        compiled.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Memory that a program frees is kept for its next call: to give back and fault in some ten megabytes at every call
    # takes about as long as the step itself on CPU. Each of the allocator's arenas keeps its own, and by default there
    # are up to eight for each processor: as threads meet in them by chance, a run would hold more from hour to hour.
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        mallopt, trim_threshold, mmap_threshold, arena_max = ctypes.CDLL(None).mallopt, -1, -3, -8
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)
        if "MALLOC_ARENA_MAX" not in os.environ and "arena_max" not in os.environ.get("GLIBC_TUNABLES", ""):
            mallopt(arena_max, max(2, len(os.sched_getaffinity(0))))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # TensorFlow carries batches and computes nothing

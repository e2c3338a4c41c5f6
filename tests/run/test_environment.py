"""What a process sets of itself before JAX is imported."""

import os
import platform
import subprocess
import sys

import pytest

# More threads than arenas, all alive, each with memory of its own.
MANY_THREADS = """
import ctypes, sys, threading
from imgclf_jax.run import environment

if sys.argv[1] == "prepared":
    environment.prepare(deterministic=False)
libc, number = ctypes.CDLL(None), int(sys.argv[2])
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
together = threading.Barrier(number)

def work():
    together.wait()
    libc.malloc(50_000)
    together.wait()

threads = [threading.Thread(target=work) for _ in range(number)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.malloc_stats()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no arenas")
def test_no_more_arenas_than_processors(tmp_path):
    """Each keeps what is freed in it, so that a long run would hold ever more."""
    processors = max(2, len(os.sched_getaffinity(0)))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("MALLOC_ARENA_MAX", None)

    def arenas(how: str) -> int:
        words = [sys.executable, "-c", MANY_THREADS, how, str(3 * processors + 3)]
        out = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        return out.stderr.count("Arena ")

    assert 1 < arenas("prepared") <= processors < arenas("left alone")

"""The internals of other libraries that `core.internals` relies on still exist."""

import os
import threading
from pathlib import Path

import jax

from imgclf_jax.core import internals


def test_what_a_thread_compiles_inside_not_cached_is_not_cached():
    """Nor changed for other threads. In the cache it would crash this process: see `not_cached`."""
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])

    def entries():
        return {path.name for path in folder.glob("*secret_name*")}

    def compile(number):
        def secret_name(x):
            return x * number

        jax.jit(secret_name).lower(1.0).compile()

    with internals.not_cached():
        compile(os.getpid())
        assert not entries()
        other = threading.Thread(target=compile, args=(os.getpid() + 1,))
        other.start()
        other.join()
        assert (others := entries())
    compile(os.getpid() + 2)
    assert entries() > others

"""The matmul peak of the machine in JAX: a large square matmul in each precision."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from networks import Network
from variants import Measure, Prepare


def device() -> str:
    """The kind of the first device."""
    return jax.devices()[0].device_kind


def open_variant(network: Network) -> Prepare:
    """The matmul, the same for every network; `mode` is the precision."""
    size = 2048 if jax.default_backend() == "cpu" else 8192

    def prepare(examples: tuple[np.ndarray, np.ndarray], mode: str, batch_size: int) -> Measure:
        values = np.random.default_rng(0).standard_normal((size, size), np.float32) / size**0.5
        a = jax.device_put(jnp.asarray(values, mode), jax.devices()[0])
        product = jax.jit(jnp.matmul)
        jax.block_until_ready(product(a, a))

        def measure(seconds: float) -> tuple[float, float]:
            calls, began = 0, time.perf_counter()
            while not calls or time.perf_counter() - began < seconds:
                jax.block_until_ready([product(a, a) for _ in range(2)])
                calls += 2
            return calls * 2.0 * size**3, time.perf_counter() - began

        return measure

    return prepare

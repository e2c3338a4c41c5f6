"""A loop in the style of Flax's ImageNet example: linen's own layers, one jitted step per float32 NumPy batch."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from networks import Network
from variants import Measure, Prepare

from imgclf_jax.core import internals
from peers.linen_twins import Classifier

_IN_FLIGHT = 16  # batches that the host may be ahead of the device


def device() -> str:
    """The kind of the first device."""
    return jax.devices()[0].device_kind


class TrainState(train_state.TrainState):
    """Flax's, with the running statistics of BatchNorm; {} without BatchNorm."""

    batch_stats: Any


def open_variant(network: Network, precision: str = "float32", apart: bool = False) -> Prepare:
    """The loop with layers of this precision; `apart` keeps XLA from fusing matmuls, as this project does."""
    if apart:
        internals.keep_matmuls_apart()

    def prepare(examples: tuple[np.ndarray, np.ndarray], mode: str, batch_size: int) -> Measure:
        images, labels = examples[0].astype(np.float32) / 255, examples[1]
        model = Classifier(network.linen(jnp.dtype(precision)), network.classes)
        variables = jax.jit(model.init)(jax.random.key(0), images[:1])
        statistics = variables.get("batch_stats", {})
        state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.adam(1e-3),
                                  batch_stats=statistics)  # fmt: skip
        if mode == "train":
            return _training(state, _batches(images, labels, batch_size), batch_size)
        starts = range(0, len(images) - batch_size + 1, batch_size)
        return _inference(state, [images[i : i + batch_size] for i in starts])

    return prepare


def _batches(images: np.ndarray, labels: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(images))
        for i in range(0, len(images) - batch_size + 1, batch_size):
            some = order[i : i + batch_size]
            yield images[some], labels[some]


def _training(state: TrainState, batches: Iterator[tuple[np.ndarray, np.ndarray]], batch_size: int) -> Measure:
    @jax.jit
    def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array, jax.Array]:
        def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, updated)

        (loss, (logits, updated)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state = state.apply_gradients(grads=grads, batch_stats=updated.get("batch_stats", {}))
        return state, loss, jnp.mean(jnp.argmax(logits, -1) == labels)

    def measure(seconds: float) -> tuple[float, float]:
        nonlocal state
        metrics: list[Any] = []
        began = time.perf_counter()
        while not metrics or time.perf_counter() - began < seconds:
            state, *both = train_step(state, *next(batches))
            metrics.append(both)
            if len(metrics) > _IN_FLIGHT:
                jax.block_until_ready(metrics[-_IN_FLIGHT])
        jax.block_until_ready((state.params, state.opt_state))
        return len(metrics) * batch_size, time.perf_counter() - began

    for _ in range(3):  # compiles
        measure(0)
    return measure


def _inference(state: TrainState, batches: list[np.ndarray]) -> Measure:
    @jax.jit
    def classes(variables: Any, images: jax.Array) -> jax.Array:
        return jnp.argmax(state.apply_fn(variables, images, train=False), -1)

    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def measure(seconds: float) -> tuple[float, float]:
        results: list[Any] = []
        began = time.perf_counter()
        while not results or time.perf_counter() - began < seconds:
            results.append(classes(variables, batches[len(results) % len(batches)]))
            if len(results) > _IN_FLIGHT:
                results[-_IN_FLIGHT] = np.asarray(results[-_IN_FLIGHT])
        jax.device_get(results[-_IN_FLIGHT:])
        return len(results) * len(batches[0]), time.perf_counter() - began

    measure(0)
    return measure

"""Keras on the backend of KERAS_BACKEND: `fit` and `predict` with all their defaults, on arrays in memory.

Only the time from the end of an epoch's fifth batch to the end of its last one counts. It excludes starting and ending
an epoch, which takes Keras up to seconds without training.
"""

import math
import time
from typing import Any

import keras
import numpy as np
from networks import Network
from variants import Measure, Prepare

_SKIPPED = 5  # batches at the beginning of an epoch


def device() -> str:
    """The device of the backend."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind
    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    import tensorflow as tf

    return "gpu" if tf.config.list_physical_devices("GPU") else "cpu"


def open_variant(network: Network) -> Prepare:
    """Keras, a model of its own for each mode and batch size, so that no program is compiled for two shapes."""

    loaded: list[np.ndarray] = []  # once, for all modes and batch sizes

    def prepare(examples: tuple[np.ndarray, np.ndarray], mode: str, batch_size: int) -> Measure:
        if not loaded:
            loaded.append(examples[0].astype(np.float32) / 255)
        count = len(examples[0]) // batch_size * batch_size  # whole batches
        images, labels = loaded[0][:count], examples[1][:count]
        model = network.keras()
        model.compile(
            optimizer=keras.optimizers.Adam(1e-3),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        if mode == "train":
            return _training(model, images, labels, batch_size)
        measures = [_predicting(model, images, batch_size)]
        if keras.backend.backend() == "tensorflow":
            measures.append(_calling(model, images, batch_size))
        return _fastest(measures)

    return prepare


class _Clock(keras.callbacks.Callback):
    """Measures each epoch from the end of its fifth batch to the end of its last, waiting for the device at both."""

    def __init__(self) -> None:
        super().__init__()
        self.batches, self.seconds = 0, 0.0

    def _reached(self, batch: int, value: Any) -> None:
        if batch == _SKIPPED - 1:
            _wait(value)
            self._began = time.perf_counter()
        elif batch == self.params["steps"] - 1:
            _wait(value)
            self.seconds += time.perf_counter() - self._began
            self.batches += self.params["steps"] - _SKIPPED

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._reached(batch, logs)

    def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
        self._reached(batch, logs)


def _wait(value: Any) -> None:
    for array in keras.tree.flatten(value):
        keras.ops.convert_to_numpy(array)


def _epochs(seconds: float, clock: _Clock, batches: int) -> int:
    """As many epochs as take about so many seconds, by what `clock` has seen."""
    rate = clock.batches / clock.seconds
    return max(1, math.ceil(seconds * rate / (batches - _SKIPPED)))


def _training(model: keras.Model, images: np.ndarray, labels: np.ndarray, batch_size: int) -> Measure:
    def fit(epochs: int) -> _Clock:
        clock = _Clock()
        model.fit(images, labels, batch_size=batch_size, epochs=epochs, verbose=0, callbacks=[clock])
        return clock

    last = fit(1)  # compiles
    last = fit(1)

    def measure(seconds: float) -> tuple[float, float]:
        nonlocal last
        last = fit(_epochs(seconds, last, len(images) // batch_size))
        return last.batches * batch_size, last.seconds

    return measure


def _predicting(model: keras.Model, images: np.ndarray, batch_size: int) -> Measure:
    def predict(passes: int) -> _Clock:
        clock = _Clock()
        for _ in range(passes):
            model.predict(images, batch_size=batch_size, verbose=0, callbacks=[clock]).argmax(-1)
        return clock

    last = predict(1)  # compiles
    last = predict(1)

    def measure(seconds: float) -> tuple[float, float]:
        nonlocal last
        last = predict(_epochs(seconds, last, len(images) // batch_size))
        return last.batches * batch_size, last.seconds

    return measure


def _calling(model: keras.Model, images: np.ndarray, batch_size: int) -> Measure:
    """The model inside of a `tf.function`, without `predict`."""
    import tensorflow as tf

    @tf.function
    def classes(batch: Any) -> Any:
        return tf.argmax(model(batch, training=False), -1)

    batches = [tf.constant(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]

    def measure(seconds: float) -> tuple[float, float]:
        results: list[Any] = []
        began = time.perf_counter()
        while not results or time.perf_counter() - began < seconds:
            results.append(classes(batches[len(results) % len(batches)]))
        tf.concat(results, 0).numpy()
        return len(results) * batch_size, time.perf_counter() - began

    measure(0)
    measure(0)
    return measure


def _fastest(measures: list[Measure]) -> Measure:
    """The best of several ways, each given its share of the time."""

    def measure(seconds: float) -> tuple[float, float]:
        return max((one(seconds / len(measures)) for one in measures), key=lambda done: done[0] / done[1])

    return measure

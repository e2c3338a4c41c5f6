"""This project's training loop: the stream, the copy to the device, and the compiled program."""

import collections
import itertools
import tempfile
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from networks import Network
from variants import Measure, Prepare

from imgclf_jax import config as configs
from imgclf_jax.core import tensorflow_import
from imgclf_jax.data import sources, stream
from imgclf_jax.programs import Programs, programs_for_images

_STEPS = 1_000_000  # more than any measurement needs
_READ_AHEAD = 6  # batches that the stream may have prefetched


def device() -> str:
    """The kind of the first device."""
    return jax.devices()[0].device_kind


def open_variant(network: Network, placement: str, precision: str) -> Prepare:
    """This project with the images on the host or resident on the device."""
    if placement == "host":
        tensorflow_import.tensorflow().result()  # or the first batches would be read without it, on demand

    def prepare(examples: tuple[np.ndarray, np.ndarray], mode: str, batch_size: int) -> Measure:
        config = configure(network, batch_size)
        config.precision, config.data.placement = precision, placement
        images = open_images(config, *examples)
        programs = programs_for_images(config, images)
        return _training(programs, images) if mode == "train" else _inference(programs, examples[0])

    return prepare


def configure(network: Network, batch_size: int) -> ConfigDict:
    """The config of a network with the peers' optimizer."""
    config = configs.default_config()
    config.total = f"{_STEPS} steps"
    config.batch_size = batch_size
    config.preprocess = f"decode({network.image_shape[2]})"
    config.augment = "normalize"
    config.model = network.model
    config.optimizer = "adam(eps=1e-7)"
    config.schedule = "constant(1e-3)"
    config.log_every, config.eval_every, config.checkpoint_every = "", "", ""
    return config


def open_images(config: ConfigDict, images: np.ndarray, labels: np.ndarray) -> stream.Images:
    """Opens the examples as an `arrays` source, all decoded, as after a run's first epoch."""
    with tempfile.TemporaryDirectory() as directory:
        np.savez(f"{directory}/random.npz", x_train=images, y_train=labels)
        source = sources.open_splits(f"arrays('{directory}/random.npz')")["train"]
    opened = stream.Images(source, config.preprocess, config.seed)
    everything = np.arange(len(opened), dtype=np.int64)
    opened.read(everything, everything)
    return opened


def run_steps(programs: Programs, state: Any, batches: Any, seconds: float) -> tuple[Any, int, float]:
    """Trains on `batches` for about `seconds`, like the loop of train.main: (state, images, seconds taken)."""
    sums = programs.zero_sums()
    in_flight: collections.deque[Any] = collections.deque()
    steps, began = 0, time.perf_counter()
    while not steps or time.perf_counter() - began < seconds:
        state, sums = programs.train(state, sums, next(batches))
        in_flight.append(sums["steps"])
        if len(in_flight) > 2:
            in_flight.popleft().block_until_ready()
        steps += 1
    jax.block_until_ready((state, sums))
    return state, steps * programs.recipe.config.batch_size, time.perf_counter() - began


def _training(programs: Programs, images: stream.Images) -> Measure:
    state = programs.init_state()
    batches = (batch for _, batch in programs.batches(images, itertools.count()))
    for _ in range(2):  # compiles
        state, *_ = run_steps(programs, state, batches, 0)

    def measure(seconds: float) -> tuple[float, float]:
        nonlocal state
        if programs.recipe.config.data.placement == "host":
            for _ in range(_READ_AHEAD):  # drop batches prefetched while other variants were measured
                next(batches)
        state, done, elapsed = run_steps(programs, state, batches, seconds)
        return done, elapsed

    return measure


def _inference(programs: Programs, images: np.ndarray) -> Measure:
    """The program of `predict`."""
    batch_size, state = programs.recipe.config.batch_size, programs.init_state()
    usable = len(images) // batch_size * batch_size
    if not usable:
        raise ValueError(f"{len(images)} images are fewer than a batch of {batch_size}")
    batches = itertools.cycle(images[:usable].reshape(-1, batch_size, *images.shape[1:]))

    def dispatch() -> Any:
        return programs.inference("predict")(*state.evaluated, next(batches))

    def measure(seconds: float) -> tuple[float, float]:
        done, began = 1, time.perf_counter()
        before = dispatch()
        while time.perf_counter() - began < seconds:
            now = dispatch()
            jax.device_get(before)
            before = now
            done += 1
        jax.device_get(before)
        return done * batch_size, time.perf_counter() - began

    measure(0)  # compiles
    return measure

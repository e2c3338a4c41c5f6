"""The measurements of input.py, each a function that returns one record per round."""

import contextlib
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import own
import tensorflow as tf
from machine import machine, now
from networks import NETWORKS, examples
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from worker import versions

import launch
from imgclf_jax.augment import ops as augment
from imgclf_jax.core import rng
from imgclf_jax.data import stream
from imgclf_jax.run.workdir import Workdir

_BATCH, _PAD = 128, 4
_NETWORK = NETWORKS["cnn"]
_OPS = f"flip_lr|pad_crop({_PAD})|normalize"


def about() -> dict[str, Any]:
    """The machine, date and package versions."""
    packages = ("imgclf_jax", "jax", "jaxlib", "tensorflow-cpu", "tensorflow", "numpy")
    return {"date": now(), "machine": machine(), "versions": versions(packages)}


def _open(count: int) -> stream.Images:
    return own.open_images(own.configure(_NETWORK, _BATCH), *examples(_NETWORK, count))


def _own_batches(images: stream.Images, seed: int) -> Any:
    """An epoch of the stream."""
    return stream.batches(images, stream.StreamSpec(seed, _BATCH), range(len(images) // _BATCH))


def _classic(count: int, change: Callable[..., Any], parallel: int | None) -> tf.data.Dataset:
    dataset = tf.data.Dataset.from_tensor_slices(examples(_NETWORK, count)).shuffle(count, seed=0)
    dataset = dataset.map(change, num_parallel_calls=parallel)
    return dataset.batch(_BATCH, drop_remainder=True).prefetch(2)


def _scaled(image: Any, label: Any) -> tuple[Any, Any]:
    return tf.cast(image, tf.float32) / 255, label


def _augmented(image: Any, label: Any) -> tuple[Any, Any]:
    height, width, channels = _NETWORK.image_shape
    image = tf.image.resize_with_crop_or_pad(image, height + 2 * _PAD, width + 2 * _PAD)
    image = tf.image.random_crop(image, (height, width, channels))
    return _scaled(tf.image.random_flip_left_right(image), label)


def stream_rounds(rounds: int, count: int) -> list[dict[str, float]]:
    """Images per second over an epoch of the stream and of the classic pipelines."""
    images = _open(count)
    plain, parallel = (_classic(count, _scaled, calls) for calls in (None, tf.data.AUTOTUNE))

    def rate(epoch: Callable[[], Any]) -> float:
        time.sleep(0.3)
        began = time.perf_counter()
        for _ in epoch():
            last = time.perf_counter()  # excludes closing the iterator, which can take tf.data seconds
        return count // _BATCH * _BATCH / (last - began)

    def measure(seed: int) -> dict[str, float]:
        record = {
            "own": rate(lambda: _own_batches(images, seed)),
            "classic": rate(lambda: plain),
            "classic_parallel": rate(lambda: parallel),
        }
        return {**record, "ratio": record["own"] / max(record["classic"], record["classic_parallel"])}

    measure(rounds)  # warms up
    return [measure(seed) for seed in range(rounds)]


def augment_rounds(rounds: int, count: int) -> list[dict[str, float]]:
    """CPU time in µs per image over an epoch with flips and padded crops."""
    images = _open(count)
    ops = augment.build(_OPS, train=True)
    cpu = jax.devices("cpu")[0]

    @functools.partial(jax.jit, static_argnames="seed")
    def augmented(seed: int, step: Any, batch: Any) -> Any:
        return ops(rng.key(seed, "augment", step), batch)

    def own_epoch(seed: int) -> None:
        with jax.default_device(cpu):
            for step, batch in _own_batches(images, seed):
                augmented(0, np.int32(step), batch["image"]).block_until_ready()

    classic = _classic(count, _augmented, tf.data.AUTOTUNE)

    def classic_epoch(seed: int) -> None:
        for _ in classic:
            pass

    def microseconds(epoch: Callable[[int], None], seed: int) -> float:
        time.sleep(0.3)
        began = time.process_time()
        epoch(seed)
        return 1e6 * (time.process_time() - began) / (count // _BATCH * _BATCH)

    def measure(seed: int) -> dict[str, float]:
        record = {"own": microseconds(own_epoch, seed), "classic": microseconds(classic_epoch, seed)}
        return {**record, "ratio": record["classic"] / record["own"]}

    measure(rounds)  # compiles
    return [measure(seed) for seed in range(rounds)]


def loop_rounds(rounds: int, count: int, epochs: int, seconds: float) -> list[dict[str, float]]:
    """Images per second of `launch.py train` and of its compiled program alone."""
    images, labels = examples(_NETWORK, count)
    with tempfile.TemporaryDirectory() as directory:
        source = own.write_arrays(
            Path(directory) / "random.npz", x_train=images, y_train=labels, x_test=images[:_BATCH],
            y_test=labels[:_BATCH],
        )  # fmt: skip
        runs = (Workdir(Path(directory) / str(number)) for number in itertools.count())
        first = next(runs)
        _train(first, source, epochs)  # compiles
        bare = _bare(first, images, labels)
        before = bare(seconds)
        records = []
        for _ in range(rounds):
            run = next(runs)
            _train(run, source, epochs)
            after = bare(seconds)
            record = {"bare": (before + after) / 2, **_logged(run)}
            for name in ("logged", "clock"):
                record[f"{name}_to_bare"] = record[name] / record["bare"]
            records.append(record)
            before = after
    return records


def _train(workdir: Workdir, source: str, epochs: int) -> None:
    flags = {
        "data.source": source,
        "batch_size": _BATCH,
        "total": f"{epochs} epochs",
        "log_every": "100 steps",
        "eval_every": "",
        "checkpoint_every": "1 epochs",
    }
    command = [
        "train", f"--config={Path(launch.__file__).with_name('configs') / 'fashion_mnist.py'}",
        f"--workdir={workdir.path}", *(f"--config.{key}={value}" for key, value in flags.items()),
    ]  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        if status := launch.main(command):
            raise SystemExit(status)


def _bare(workdir: Workdir, images: np.ndarray, labels: np.ndarray) -> Callable[[float], float]:
    """Returns a measurement, seconds → images per second, of the run's compiled program on one batch of its stream."""
    config = workdir.load_config()
    opened = own.open_images(config, images, labels)
    programs = own.assemble(config, opened)
    batch = jax.block_until_ready(next(own.open_batches(programs, opened)))
    state, _ = own.start(programs)

    def rate(seconds: float) -> float:
        nonlocal state
        time.sleep(0.3)
        state, done, elapsed = own.run_steps(programs, state, itertools.repeat(batch), seconds)
        return done / elapsed

    rate(0)
    return rate


def _logged(workdir: Workdir) -> dict[str, float]:
    """A run's rate as logged and by wall time, and its wait for input, from its records."""
    lines = [json.loads(line) for line in (workdir.path / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if "train/images_per_second" in line]
    waits = [record["train/input_wait"] for record in records]
    events = EventAccumulator(str(workdir.path / "tb"), size_guidance={"tensors": 0}).Reload()
    written = events.Tensors("train/images_per_second")
    steps, elapsed = written[-1].step - written[0].step, written[-1].wall_time - written[0].wall_time
    return {
        "logged": statistics.median(record["train/images_per_second"] for record in records),
        "clock": steps * _BATCH / elapsed,
        "input_wait": statistics.median(waits),
        "input_wait_max": max(waits),
    }

"""The cost of the input pipeline: the stream against per-example tf.data, and the loop against the bare train step.

    uv run benchmarks/input.py

On random 28×28 images in memory, in batches of 128:

1. `stream`: images per second over one epoch of shuffled uint8 batches, from opening the stream to its last batch,
   against the classic pipeline: from_tensor_slices, shuffle, a map to float, batch, prefetch; with a sequential and
   with a parallel (AUTOTUNE) map.
2. `loop`: images per second that `launch.py train` logs, median over its records, against the same compiled program
   called repeatedly on one batch on the device. Also the fraction of time that the loop waits for input.

Both are interleaved, `--rounds` times. Ratios are taken within a round; those of `loop` are to the mean of the bare
steps just before and after it. Reports the median over the rounds and [min, max]. Writes input.json.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine, now
from networks import NETWORKS, examples
from report import cell, spread
from rich.console import Console
from rich.table import Table

_BATCH, _PAUSE = 128, 0.3  # seconds until the threads of the previous measurement sleep
_NETWORK = NETWORKS["cnn"]

# The measurements of each part: key in the records → (label, format).
ROWS = {
    "stream": {
        "own": ("imgclf_jax stream, images/s", ",.0f"),
        "classic": ("classic, images/s", ",.0f"),
        "classic_parallel": ("classic with a parallel map, images/s", ",.0f"),
        "ratio": ("stream to the faster classic", ".2f"),
    },
    "loop": {
        "bare": ("bare step, images/s", ",.0f"),
        "logged": ("loop as logged, images/s", ",.0f"),
        "ratio": ("as logged to bare", ".3f"),
        "input_wait": ("fraction of time waiting for input", ".4f"),
    },
}


def stream_rounds(rounds: int, count: int) -> list[dict[str, float]]:
    """Images per second over an epoch of the stream and of the classic pipelines."""
    import own
    import tensorflow as tf

    from imgclf_jax.data import stream

    images = own.open_images(own.configure(_NETWORK, _BATCH), *examples(_NETWORK, count))

    def scaled(image: Any, label: Any) -> tuple[Any, Any]:
        return tf.cast(image, tf.float32) / 255, label

    def classic(parallel: int | None) -> Any:
        dataset = tf.data.Dataset.from_tensor_slices(examples(_NETWORK, count)).shuffle(count, seed=0)
        return dataset.map(scaled, num_parallel_calls=parallel).batch(_BATCH, drop_remainder=True).prefetch(2)

    def rate(epoch: Callable[[], Any]) -> float:
        time.sleep(_PAUSE)
        began = time.perf_counter()
        for _ in epoch():
            last = time.perf_counter()  # excludes closing the iterator, which can take tf.data seconds
        return count // _BATCH * _BATCH / (last - began)

    plain, parallel = classic(None), classic(tf.data.AUTOTUNE)

    def measure(seed: int) -> dict[str, float]:
        record = {
            "own": rate(lambda: stream.batches(images, stream.StreamSpec(seed, _BATCH), range(count // _BATCH))),
            "classic": rate(lambda: plain),
            "classic_parallel": rate(lambda: parallel),
        }
        return {**record, "ratio": record["own"] / max(record["classic"], record["classic_parallel"])}

    measure(rounds)  # warms up
    return [measure(seed) for seed in range(rounds)]


def loop_rounds(rounds: int, count: int) -> list[dict[str, float]]:
    """Images per second of `launch.py train` and of its compiled program alone."""
    import own

    images, labels = examples(_NETWORK, count)
    with tempfile.TemporaryDirectory() as directory:
        source = own.write_arrays(
            Path(directory) / "random.npz", x_train=images, y_train=labels, x_test=images[:_BATCH],
            y_test=labels[:_BATCH],
        )  # fmt: skip
        paths = (Path(directory) / str(number) for number in itertools.count())
        first = next(paths)
        _train(first, source)  # compiles
        bare = _bare(first, images, labels)
        before, records = bare(), []
        for _ in range(rounds):
            run = next(paths)
            logged = _train(run, source)
            after = bare()
            mean = (before + after) / 2
            records.append({"bare": mean, "ratio": logged["logged"] / mean, **logged})
            before = after
    return records


def _train(workdir: Path, source: str) -> dict[str, float]:
    """Trains three epochs. Returns the medians of the images per second and of the input wait that it logs."""
    import launch

    flags = {"data.source": source, "batch_size": _BATCH, "total": "3 epochs", "log_every": "100 steps",
             "eval_every": ""}  # fmt: skip
    command = ["train", f"--config={Path(launch.__file__).with_name('configs') / 'fashion_mnist.py'}",
               f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in flags.items())]  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        if status := launch.main(command):
            raise SystemExit(status)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if "train/images_per_second" in line]
    return {"logged": statistics.median(record["train/images_per_second"] for record in records),
            "input_wait": statistics.median(record["train/input_wait"] for record in records)}  # fmt: skip


def _bare(workdir: Path, images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """Returns a measurement of two seconds: images per second of the run's compiled program on one batch."""
    import jax
    import own

    from imgclf_jax.run.workdir import Workdir

    config = Workdir(workdir).load_config()
    opened = own.open_images(config, images, labels)
    programs = own.assemble(config, opened)
    batch = jax.block_until_ready(next(own.open_batches(programs, opened)))
    state, _ = own.start(programs)

    def rate(seconds: float = 2.0) -> float:
        nonlocal state
        time.sleep(_PAUSE)
        state, done, elapsed = own.run_steps(programs, state, itertools.repeat(batch), seconds)
        return done / elapsed

    rate(0)
    return rate


def main(argv: list[str]) -> int:
    """Measures part by part, prints a table and writes input.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(ROWS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args(argv)
    if wrong := [part for part in args.parts.split(",") if part not in ROWS]:
        parser.error(f"unknown part {wrong[0]!r}; allowed are {', '.join(ROWS)}")
    args.out.mkdir(parents=True, exist_ok=True)

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from imgclf_jax.run import environment

    environment.prepare(True)  # before JAX and TensorFlow are imported
    from worker import versions

    measure = {"stream": stream_rounds, "loop": loop_rounds}
    packages = ("imgclf_jax", "jax", "jaxlib", "tensorflow-cpu", "tensorflow", "numpy")
    result: dict[str, Any] = {"arguments": argv, "date": now(), "machine": machine(), "versions": versions(packages)}
    result["parts"] = {}
    table = Table("part", "measurement", title="median [least, greatest] over the rounds", title_justify="left")
    table.add_column("", justify="right", no_wrap=True)
    for part in args.parts.split(","):
        rounds = measure[part](args.rounds, args.images)
        summary = {key: spread([each[key] for each in rounds]) for key in ROWS[part]}
        result["parts"][part] = {"rounds": rounds, "summary": summary}
        for key, (name, form) in ROWS[part].items():
            table.add_row(part, name, cell(summary[key], form))
        table.add_section()
        (args.out / "input.json").write_text(json.dumps(result, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False).print(table)
    print(f"every measurement is in {args.out / 'input.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The cost of the input pipeline: the stream against per-example tf.data, and the loop against the bare train step.

    uv run benchmarks/input.py

On random 28×28 images in memory, in batches of 128:

1. `stream`: images per second over one epoch of shuffled uint8 batches, from opening the stream to its last batch,
   against the classic pipeline: from_tensor_slices, shuffle, a map to float, batch, prefetch; with a sequential and
   with a parallel (AUTOTUNE) map.
2. `augment`: CPU time per image, over all threads of the process, of an epoch with flips and padded crops: the stream
   and the augmentation jitted on CPU, against tf.image ops mapped per example.
3. `loop`: images per second that `launch.py train` logs (median over its records) and reaches between its first and
   last record (wall time, including checkpoints and logging), against the same compiled program called repeatedly on
   one batch on the device. Also the fraction of time that the loop waits for input.

All are interleaved, `--rounds` times. Ratios are taken within a round; those of `loop` are to the mean of the bare
steps just before and after it. Reports the median over the rounds and [min, max]. Writes input.json.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from report import cell, spread
from rich.console import Console
from rich.table import Table

# The measurements of each part: key in the records → (label, format).
ROWS = {
    "stream": {
        "own": ("imgclf_jax stream, images/s", ",.0f"),
        "classic": ("classic, images/s", ",.0f"),
        "classic_parallel": ("classic with a parallel map, images/s", ",.0f"),
        "ratio": ("stream to the faster classic", ".2f"),
    },
    "augment": {
        "own": ("imgclf_jax stream and augmentation, CPU µs per image", ".2f"),
        "classic": ("classic, CPU µs per image", ".2f"),
        "ratio": ("classic to imgclf_jax", ".2f"),
    },
    "loop": {
        "bare": ("bare step, images/s", ",.0f"),
        "logged": ("loop as logged, images/s", ",.0f"),
        "clock": ("loop by wall time, images/s", ",.0f"),
        "logged_to_bare": ("as logged to bare", ".3f"),
        "clock_to_bare": ("by wall time to bare", ".3f"),
        "input_wait": ("fraction of time waiting for input, median of a run", ".4f"),
        "input_wait_max": ("the same, maximum of a run", ".4f"),
    },
}


def main(argv: list[str]) -> int:
    """Measures part by part, prints a table and writes input.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(ROWS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=3, help="of each run of the loop")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement of the bare step, about")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if wrong := [part for part in args.parts if part not in ROWS]:
        parser.error(f"unknown part {wrong[0]!r}; allowed are {', '.join(ROWS)}")
    args.out.mkdir(parents=True, exist_ok=True)

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from imgclf_jax.run import environment

    environment.prepare(True)  # before JAX and TensorFlow are imported
    import input_parts

    measure = {
        "stream": lambda: input_parts.stream_rounds(args.rounds, args.images),
        "augment": lambda: input_parts.augment_rounds(args.rounds, args.images),
        "loop": lambda: input_parts.loop_rounds(args.rounds, args.images, args.epochs, args.seconds),
    }
    result: dict[str, Any] = {"arguments": argv, **input_parts.about(), "parts": {}}
    table = Table("part", "measurement", title="median [least, greatest] over the rounds", title_justify="left")
    table.add_column("", justify="right", no_wrap=True)
    for part in args.parts:
        rounds = measure[part]()
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

"""Times each operation of the tutorial network's train step against the matmul peak of this machine.

    uv run benchmarks/operations.py [--batch_size=128] [--precisions=float32,bfloat16]

Each operation runs alone in a loop on the device, as the train step does. Its limit is its FLOPs at the rate of a large
square matmul measured in the same round. Prints the median over the rounds. Writes operations.json.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from imgclf_jax.run import environment

environment.prepare(True)

import jax
import jax.numpy as jnp
from machine import machine, now
from networks import conv_flops, dense_flops
from rich.console import Console
from rich.table import Table

from imgclf_jax.models.cpu import matmuls, pool

_LOOP = 20  # iterations per call of the compiled program
Operation = tuple[str, int, Callable[..., Any], tuple[Any, ...]]  # name, FLOPs per image, function, its arguments


def looped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a program that calls `function` _LOOP times in a loop on the device, with other arguments each time."""

    def run(many: Any) -> Any:
        first = jax.tree.map(lambda x: x[0], many)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *first))
        return jax.lax.scan(lambda _, some: (function(*some), None), zeros, many)[0]

    return jax.jit(run)


def operations(b: int, dtype: Any) -> list[Operation]:
    """The operations of the two blocks and the first dense layer, on channel-first images [c, h, w, b]."""
    keys = iter(jax.random.split(jax.random.key(0), 99))

    def normal(*shape: int, kind: Any = jnp.float32) -> jax.Array:
        return jax.random.normal(next(keys), (_LOOP, *shape)).astype(kind)

    def gradients(function: Any, wanted: tuple[int, ...]) -> Any:
        """(…inputs, gradient of the output) → the gradients of the inputs in `wanted`."""

        def run(*args: Any) -> Any:
            grads = jax.vjp(function, *args[:-1])[1](args[-1])
            return [grads[i] for i in wanted]

        return run

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return matmuls.conv(x, kernel, (1, 1), ((0, -1), (0, -1)), dtype)

    def block0(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return pool.conv_pool_direct(x, kernel, bias, 2, dtype)

    def block1(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return pool.conv_pool(x, kernel, bias, 2, dtype)

    def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return matmuls.flat_dense(x, kernel, dtype)

    flops0, flops1, flops2 = conv_flops(26, 26, 3, 1, 32), conv_flops(10, 10, 3, 32, 64), dense_flops(1600, 64)
    images, x, features = normal(1, 28, 28, b), normal(32, 13, 13, b, kind=dtype), normal(64, 5, 5, b, kind=dtype)
    kernel0, kernel1, kernel2 = normal(3, 3, 1, 32), normal(3, 3, 32, 64), normal(1600, 64)
    bias0, bias1 = normal(32), normal(64)
    return [
        ("block 0: convolution, pooling, bias, ReLU", flops0, block0, (images, kernel0, bias0)),
        ("block 0: these and their gradients", 2 * flops0, gradients(block0, (1, 2)), (images, kernel0, bias0, x)),
        ("block 1: convolution", flops1, conv, (x, kernel1)),
        (
            "block 1: its gradients, with im2col again",
            2 * flops1,
            gradients(conv, (0, 1)),
            (x, kernel1, normal(64, 10, 10, b)),
        ),
        ("block 1: convolution, pooling, bias, ReLU", flops1, block1, (x, kernel1, bias1)),
        ("block 1: these and their gradients", 3 * flops1, gradients(block1, (0, 1, 2)), (x, kernel1, bias1, features)),
        ("dense layer", flops2, dense, (features, kernel2)),
        ("dense layer's gradients", 2 * flops2, gradients(dense, (0, 1)), (features, kernel2, normal(64, b))),
    ]


def seconds(function: Any, args: Any, least: float = 0.15) -> float:
    """Seconds per iteration of a `looped` program."""
    calls, began = 0, time.perf_counter()
    while not calls or time.perf_counter() - began < least:
        jax.block_until_ready(function(args))
        calls += 1
    return (time.perf_counter() - began) / calls / _LOOP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    console = Console()
    results: dict[str, Any] = {"machine": machine(), "began": now(), "argv": sys.argv}
    for precision in args.precisions.split(","):
        dtype = jnp.dtype(precision)
        square = jnp.ones((_LOOP, 2048, 2048), dtype)
        peak_program = looped(lambda x: x @ x)
        programs = [(name, flops, looped(function), inputs) for name, flops, function, inputs in operations(
            args.batch_size, dtype)]  # fmt: skip
        for *_, program, inputs in programs:
            jax.block_until_ready(program(inputs))
        peaks: list[float] = []
        times: dict[str, list[float]] = {name: [] for name, *_ in programs}
        for _ in range(args.rounds):
            peaks.append(2 * 2048**3 / seconds(peak_program, (square,), 0))
            for name, _, program, inputs in programs:
                times[name].append(seconds(program, inputs) / args.batch_size)
        peak = statistics.median(peaks)
        table = Table(title=f"{precision}, batch {args.batch_size}, matmul peak {peak / 1e9:.0f} GFLOP/s")
        table.add_column("operation", no_wrap=True)
        for column in ("µs per image", "limit", "limit / time"):
            table.add_column(column, justify="right")
        rows = []
        for name, flops, *_ in programs:
            taken, limit = statistics.median(times[name]), flops / peak
            rows.append({"operation": name, "seconds": taken, "limit": limit, "all": times[name]})
            shown = (f"{limit * 1e6:.1f}", f"{limit / taken:.0%}") if flops else ("", "")
            table.add_row(name, f"{taken * 1e6:.1f}", *shown)
        console.print(table)
        results[precision] = {"peak": peak, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "operations.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

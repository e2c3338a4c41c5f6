"""Each operation of the tutorial's network's training step on this machine, beside the limit of its matrix products.

    uv run benchmarks/operations.py [--batch_size=128] [--precisions=float32,bfloat16]

Each is timed alone in a loop on the device, as the training step runs in one; the limit is its FLOPs at the rate of a
large square product measured in the same round. The median over the rounds is printed. Writes operations.json.
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

import launch

launch._set_environment(True)

import jax
import jax.numpy as jnp
from machine import machine, now
from networks import conv_flops, dense_flops
from rich.console import Console
from rich.table import Table

from imgclf_jax.models import layers

_LOOP = 20  # calls in one call of the compiled program
Operation = tuple[str, int, Callable[..., Any], tuple[Any, ...]]  # name, FLOPs an image, function, its arguments


def looped(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` called _LOOP times in a loop on the device, each time on arguments of its own."""

    def run(many: Any) -> Any:
        first = jax.tree.map(lambda x: x[0], many)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *first))
        return jax.lax.scan(lambda _, some: (function(*some), None), zeros, many)[0]

    return jax.jit(run)


def operations(b: int, dtype: Any) -> list[Operation]:
    """Those of the two blocks, on mirrored images [c, h, w, b], and of the first dense layer."""
    keys = iter(jax.random.split(jax.random.key(0), 99))

    def normal(*shape: int, kind: Any = jnp.float32) -> jax.Array:
        return jax.random.normal(next(keys), (_LOOP, *shape)).astype(kind)

    out: list[Operation] = []
    for block, (c, size, f) in enumerate([(1, 28, 32), (32, 13, 64)]):
        n = (size - 2) // 2 * 2
        flops = conv_flops(n, n, 3, c, f)

        def conv(x: jax.Array, kernel: jax.Array, n: int = n) -> jax.Array:
            return layers.conv_mirrored(x, kernel, (1, 1), (n, n), dtype)

        def to_kernel(x: Any, kernel: Any, gradient: Any, conv: Any = conv) -> Any:
            return jax.vjp(lambda kernel: conv(x, kernel), kernel)[1](gradient)

        def to_images(x: Any, kernel: Any, gradient: Any, conv: Any = conv) -> Any:
            return jax.vjp(lambda x: conv(x, kernel), x)[1](gradient)

        def pool(y: jax.Array, bias: jax.Array) -> jax.Array:
            return layers.pool_bias_relu(y, bias, 2, 0, dtype)

        def pool_both(y: jax.Array, bias: jax.Array, gradient: jax.Array) -> Any:
            return jax.vjp(pool, y, bias)[1](gradient)

        x, kernel = normal(c, size, size, b, kind=dtype), normal(3, 3, c, f)
        y, half = normal(f, n, n, b), normal(f, n // 2, n // 2, b, kind=dtype)
        out.append((f"block {block}: convolution", flops, conv, (x, kernel)))
        out.append((f"block {block}: weight gradient, patches anew", flops, to_kernel, (x, kernel, y)))
        if block:
            out.append((f"block {block}: input gradient", flops, to_images, (x, kernel, y)))
        out.append((f"block {block}: pooling, bias, ReLU", 0, pool, (y, normal(f))))
        out.append((f"block {block}: pooling and its gradient", 0, pool_both, (y, normal(f), half)))

    def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.dot(x.T, kernel.astype(dtype))

    def dense_both(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Any:
        return jax.vjp(dense, x, kernel)[1](gradient)

    x, kernel = normal(1600, b, kind=dtype), normal(1600, 64)
    out.append(("dense layer", dense_flops(1600, 64), dense, (x, kernel)))
    out.append(
        ("dense layer's gradients", 2 * dense_flops(1600, 64), dense_both, (x, kernel, normal(b, 64, kind=dtype)))
    )
    return out


def seconds(function: Any, args: Any, least: float = 0.15) -> float:
    """Of one of the calls that `looped` makes."""
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
        table = Table(title=f"{precision}, batch {args.batch_size}, products at {peak / 1e9:.0f} GFLOP/s at most")
        table.add_column("operation", no_wrap=True)
        for column in ("µs an image", "limit", "limit / time"):
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

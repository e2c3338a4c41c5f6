"""Compares XLA's accelerator programs of this project's networks with the same networks in plain linen.

    uv run --isolated --extra tpu benchmarks/twins.py --chips=v5e:1x1 [--model=vit,resnet50] [--batch_size=128]
    uv run --isolated --extra cuda-compiler benchmarks/twins.py --chips=h100:1 [--deterministic]

A training step in bfloat16 (softmax cross-entropy, SGD with momentum, images f32) is compiled ahead of time for chips
that need not be present. The table shows, for both: memory traffic and temporaries by the compiler's count; matmuls and
convolutions with float32 operands in the lowered program; elements all-reduced over the chips, by dtype; and the CPU
seconds of compilation. `ratio` is ours divided by linen's. Writes twins-CHIPS.json.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from imgclf_jax.tools.dryrun import topology

_WIDE = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.* : \(([^)]*)\) ->")
_SUMMED = re.compile(r" = (.*?) all-reduce(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def main() -> None:
    """Compiles, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default="v5e:1x1")
    parser.add_argument("--model", default="", help="comma-separated names; default: all")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--deterministic", action="store_true", help="XLA's deterministic GPU kernels")
    parser.add_argument("--out", type=Path, default=Path())
    flags = parser.parse_args()
    chips = topology.parse(flags.chips)
    topology.prepare(chips)
    if flags.deterministic:
        os.environ["XLA_FLAGS"] += " --xla_gpu_deterministic_ops=true"
    from peers.linen_twins import TWINS

    names = flags.model.split(",") if flags.model else list(TWINS)
    devices = topology.devices(chips)
    rows = {}
    for name in names:
        rows[name] = {kind: measure(name, kind, devices, flags.batch_size) for kind in ("ours", "linen")}
        _print(name, rows[name])
    flags.out.mkdir(parents=True, exist_ok=True)
    path = flags.out / f"twins-{flags.chips.replace(':', '-')}.json"
    path.write_text(json.dumps({**vars(flags), "out": str(flags.out), "rows": rows}, indent=2), encoding="utf-8")


def model(name: str, kind: str) -> Any:
    """Builds the classifier of this name in bfloat16, this project's or linen's."""
    from peers.linen_twins import TWINS, Classifier

    from imgclf_jax.models import classifier

    spec, _, classes, linen = TWINS[name]
    return classifier.build(spec, classes, "bfloat16") if kind == "ours" else Classifier(linen(), classes)


def measure(name: str, kind: str, devices: list[Any], batch_size: int) -> dict[str, Any]:
    """Compiles the train step of one network, "ours" or "linen", for these devices, and returns its statistics."""
    lowered = lower(name, kind, devices, batch_size)
    began = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - began
    text = compiled.as_text()
    return {
        "bytes": (compiled.cost_analysis() or {}).get("bytes accessed", 0),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "float32_products": float32_products(lowered.as_text()),
        "summed_over_chips": summed(text),
        "compile_seconds": seconds,
    }


def float32_products(text: str) -> int:
    """The number of matmuls and convolutions with a float32 operand in a lowered program."""
    return sum("f32>" in operands for operands in _WIDE.findall(text))


def summed(text: str) -> dict[str, int]:
    """The number of elements that a compiled program all-reduces over the chips, by dtype."""
    total: Counter[str] = Counter()
    for result in _SUMMED.findall(text):
        arrays = _ARRAY.findall(result)
        # An all-reduce-start may return its operands, too, before its results.
        for dtype, shape in arrays[len(arrays) // 2 :] if result.startswith("((") else arrays:
            total[dtype] += math.prod(int(n) for n in shape.split(",") if n)
    return dict(total)


def lower(name: str, kind: str, devices: list[Any], batch_size: int) -> Any:
    """Lowers the train step for the devices, with the batch sharded over them."""
    import jax
    import jax.numpy as jnp
    import optax
    from peers.linen_twins import TWINS

    from imgclf_jax import losses
    from imgclf_jax.core import platform, sharding

    mesh, shape, module = sharding.make_mesh(devices), TWINS[name][1], model(name, kind)
    loss = losses.softmax if kind == "ours" else optax.softmax_cross_entropy_with_integer_labels
    optimizer = optax.sgd(0.1, momentum=0.9)

    def init(key: jax.Array) -> Any:
        variables = module.init(key, jnp.zeros((1, *shape)), train=False)
        return variables, optimizer.init(variables["params"])

    def step(variables: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> Any:
        others = {k: v for k, v in variables.items() if k != "params"}

        def mean_loss(params: Any) -> tuple[jax.Array, Any]:
            logits, new = module.apply({"params": params, **others}, images, train=True, mutable=list(others))
            return jnp.mean(loss(logits, labels)), new

        (value, others), grads = jax.value_and_grad(mean_loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **others}, opt_state, value

    replicated, split = sharding.replicated(mesh), sharding.sharded(mesh)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), jax.eval_shape(init, jax.random.key(0))
    )
    batch = (
        jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=split),
    )
    form = platform.platform_of(mesh)  # ignored by linen's layers
    return (
        jax.jit(platform.tracing_for(form)(step), out_shardings=replicated, donate_argnums=(0, 1))
        .trace(*state, *batch)
        .lower()
    )


def _print(name: str, row: dict[str, Any]) -> None:
    ours, linen = row["ours"], row["linen"]
    print(f"{name:12}{'ours':>16}{'linen':>14}{'ratio':>8}")
    for key in ("bytes", "temporaries", "float32_products", "compile_seconds"):
        ratio = ours[key] / linen[key] if linen[key] else float("nan")
        print(f"  {key:18}{ours[key]:8.4g}{linen[key]:14.4g}{ratio:8.3f}")
    print(f"  summed_over_chips {ours['summed_over_chips']}  |  {linen['summed_over_chips']}", flush=True)


if __name__ == "__main__":
    main()

"""A model's blocks with their output shapes, parameters and FLOPs."""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from imgclf_jax.core import jaxprs, platform, rng


@dataclass(frozen=True)
class Block:
    """A part of a model, such as a residual block: `backbone/layer1_0`, or the head."""

    name: str
    output: tuple[int, ...]  # its output's shape without the batch axis; () if it returns several arrays
    parameters: int
    flops: float  # of the matmuls of one image's forward pass, two per multiply-add


def summarize(
    model: nn.Module, image_shape: tuple[int, int, int], parameters: Mapping[str, tuple[int, ...]]
) -> list[Block]:
    """The blocks of a model of images [b, h, w, c], in the order in which it calls them.

    A block is a submodule of the backbone, or a submodule beside it, with parameters or matmuls. `parameters` are
    shapes by path; the backbone's own ones make a block of that name. Traces the model once, and computes nothing.
    """
    outputs: dict[tuple[str, ...], tuple[int, ...]] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        if context.method_name == "__call__" and (path := _block_of(context.module.path)) == context.module.path:
            outputs[path] = result.shape[1:] if isinstance(result, jax.Array) else ()
        return result

    def forward(images: jax.Array) -> Any:
        with nn.intercept_methods(watch):
            return model.init_with_output(rng.init_streams(jax.random.key(0)), images, train=False)

    with platform.tracing_for("tpu"):  # where layers are plain matmuls and convolutions
        jaxpr = jax.make_jaxpr(forward)(jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    flops, counts = (collections.defaultdict[tuple[str, ...], float](float) for _ in range(2))
    for scope, count in jaxprs.matmul_flops_by_scope(jaxpr).items():
        flops[_block_of(_names(scope, outputs))] += count
    for name, shape in parameters.items():
        counts[_block_of(tuple(name.split("/")[:-1]))] += math.prod(shape)
    paths = [*outputs, *sorted(counts.keys() - outputs.keys())]
    return [Block("/".join(path) or "model", outputs.get(path, ()), int(counts[path]), flops[path]) for path in paths
            if counts[path] or flops[path]]  # fmt: skip


def _block_of(path: Sequence[str]) -> tuple[str, ...]:
    """The block that a module belongs to: two names below the backbone, else one."""
    return tuple(path[: 2 if path[:1] == ("backbone",) else 1])


def _names(scope: str, known: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The path of the module that a name scope, such as "Classifier/Classifier.features/backbone/conv1", is in."""
    names = tuple(name for name in scope.split("/") if "." not in name)
    firsts = {path[0] for path in known if path}
    start = next((i for i, name in enumerate(names) if name in firsts), len(names))
    return names[start:]


COLUMNS = ("block", "output", "parameters", "FLOPs")


def rows(blocks: Sequence[Block]) -> list[tuple[str, str, str, str]]:
    """The blocks and their sum as text, see COLUMNS. Equal neighbors that are numbered share a row."""
    table = []
    for (stem, *_), group in itertools.groupby(blocks, key=lambda b: (_stem(b.name), b.output, b.parameters, b.flops)):
        first, *others = group
        name = f"{first.name} … {others[-1].name.rpartition('/')[2]}" if others and stem != first.name else first.name
        many = f"{1 + len(others)} x " if others else ""
        table.append((name.removeprefix("backbone/"), _shape(first.output), f"{many}{first.parameters:,}",
                      f"{many}{amount(first.flops)}"))  # fmt: skip
    total = sum(block.parameters for block in blocks), amount(sum(block.flops for block in blocks))
    return [*table, ("total", "", f"{total[0]:,}", total[1])]


def _stem(name: str) -> str:
    return re.sub(r"\d+$", "", name)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def amount(number: float) -> str:
    """A number with three digits and a unit: 4.09 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size * 0.9995:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"

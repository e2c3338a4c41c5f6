"""A model's parameters by module and its FLOPs."""

import collections
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from imgclf_jax.core import jaxprs, platform, rng


def parameters_by_module(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The parameters of each module of the backbone and beside it, from all shapes by path; `layer1_*` is a sum."""
    counts = collections.Counter[str]()
    for path, shape in shapes.items():
        module = path.removeprefix("backbone/").split("/")[0]
        counts[re.sub(r"\d+$", "*", module)] += math.prod(shape)
    return dict(counts)


def forward_flops(model: nn.Module, image_shape: tuple[int, int, int]) -> float:
    """FLOPs of the matmuls of a forward pass of one image, two per multiply-add."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with platform.tracing_for("gpu"):  # where layers are plain matmuls and convolutions
        init = jax.make_jaxpr(lambda x: model.init_with_output(rng.init_streams(jax.random.key(0)), x, train=False))
        return jaxprs.matmul_flops(init(images))

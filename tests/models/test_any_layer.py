"""Convolutions and dense layers with any settings train on CPU, and give what plain linen gives in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from flax import linen as nn

from imgclf_jax.core import internals, platform
from imgclf_jax.models import layers

pytestmark = pytest.mark.optimized


class Network(nn.Module):
    """A convolution, ordinary operations and two dense layers, of linen or of this project."""

    conv: nn.Module
    dense: tuple[nn.Module, nn.Module]

    def __call__(self, x):
        y = self.conv(x)
        y = self.dense[0](y.mean((1, 2)))
        return self.dense[1](nn.silu(y) + y)  # which XLA fuses wrongly into a matmul of oneDNN


def network(module, dtype, features, kernel, strides, padding, dilation, groups):
    options = {"strides": strides, "padding": padding, "kernel_dilation": dilation, "feature_group_count": groups}
    conv = module.Conv(features, kernel, **options, dtype=dtype)
    return Network(conv, (module.Dense(5, dtype=dtype), module.Dense(3, dtype=dtype)))


def derivatives(network, params, x):
    """The output, the gradient of a function of it, and the output's derivative along a direction."""

    def value(params, x):
        y = network.apply({"params": params}, x).astype(x.dtype)
        return jnp.sum(jnp.sin(y)), y

    gradient, y = jax.grad(value, (0, 1), has_aux=True)(params, x)
    return y, gradient, jax.jvp(lambda *args: value(*args)[1], (params, x), (params, x))[1]


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [0, *thorough(*range(1, 12))])
def test_any_settings_give_what_linen_gives_in_float64(dtype, onednn, seed):
    rng = np.random.default_rng(seed)
    kernel, strides, dilation, low, high = (tuple(map(int, pair)) for pair in rng.integers(1, 4, (5, 2)))
    padding = ["SAME", "VALID", 1, (low, high)][seed % 4]
    arguments = int(rng.choice([4, 16])), kernel, strides, padding, dilation, int(rng.choice([1, 1, 2, 4]))
    if onednn and not platform.has_onednn():
        pytest.skip("this jaxlib has no oneDNN")
    x = rng.normal(size=(4, 11, 12, 4)).astype(np.float32)
    with jax.enable_x64():
        plain = network(nn, np.float64, *arguments)
        shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), x))["params"]
        params = jax.tree.map(lambda s: (rng.normal(size=s.shape) / s.shape[0] ** 0.5).astype(np.float32), shapes)
        wide = jax.tree.map(functools.partial(np.asarray, dtype=np.float64), (params, x))
        expected = jax.jit(functools.partial(derivatives, plain))(*wide)
    with platform.tracing_for("cpu", onednn=onednn), internals.not_cached():
        options = platform.ONEDNN_OPTIONS if onednn else None
        run = jax.jit(functools.partial(derivatives, network(layers, dtype, *arguments)), compiler_options=options)
        found = run(params, x)
    tolerance = 1e-4 if dtype == "float32" else 0.06
    for own, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(own, np.float64) - np.asarray(exact)).max() <= tolerance * max(1, np.abs(exact).max())

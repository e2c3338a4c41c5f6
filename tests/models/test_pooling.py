"""Pooling, and convolution with pooling, against Flax, in both forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from flax import linen as nn
from test_layers import applied, derivatives, normal, shapes

from imgclf_jax.models import layers
from imgclf_jax.models.cpu import pool
from imgclf_jax.models.cpu.matmuls import features_first, features_last
from imgclf_jax.models.layers import ConvPool

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize(
    ("h", "w", "window"), [(13, 12, 3), *thorough((9, 7, 2), (8, 8, 2), (5, 4, 4), (3, 6, 1), (30, 25, 12))]
)
def test_pool_bias_relu_on_cpu_is_flax_in_the_usual_order(h, w, window):
    """The same bits as convolution output + bias, ReLU, nn.max_pool; the gradient too, with ties."""
    x = jnp.asarray(np.random.default_rng(0).integers(-4, 5, (2, h, w, 3)), jnp.float32)  # of few values: ties
    bias = jnp.asarray([-4.5, 0.25, 1.5])
    weights = normal(1, 2, h // window, w // window, 3, dtype=np.float32)

    def usual(x, bias):
        return nn.max_pool(nn.relu(x + bias), (window, window), (window, window), "VALID")

    def ours(x, bias):
        return features_last(pool.pool_bias_relu(features_first(x), bias, window, jnp.float32))

    def both(function, x, bias):
        gradient = jax.grad(lambda *args: jnp.sum(function(*args) * weights), argnums=(0, 1))
        return function(x, bias), gradient(x, bias)

    (y, grads), (y_usual, expected) = (jax.jit(functools.partial(both, f))(x, bias) for f in (ours, usual))
    np.testing.assert_array_equal(y, y_usual)
    assert 0 < np.mean(np.asarray(y) == 0) < 1
    # ReLU first makes all that is below zero equal, which changes where the gradient of a zero would go: nowhere.
    np.testing.assert_array_equal(grads[0], expected[0])
    np.testing.assert_allclose(grads[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("kernel", "pool", "channels"), [(3, 2, 3), *thorough((2, 1, 2), (3, 2, 1), (3, 2, 8), (5, 3, 1), (5, 3, 4))]
)
def test_conv_pool_is_convolution_bias_relu_and_pool_in_that_order(kernel, pool, channels):
    """In float64 the numbers and gradients, also of the images, of Flax's layers in the usual order."""
    x = jnp.asarray(normal(0, 2, 15, 14, channels))
    layer = ConvPool(6, kernel, pool, dtype=jnp.float64)
    flax_conv = nn.Conv(6, (kernel, kernel), padding="VALID", dtype=jnp.float64)
    params = {
        "kernel": jnp.asarray(normal(1, *shapes(layer, x)["params"]["kernel"].shape)),
        "bias": jnp.linspace(-3, 0.3, 6) * kernel * channels**0.5,
    }

    def usual(params, x):
        return nn.max_pool(nn.relu(flax_conv.apply({"params": params}, x)), (pool, pool), (pool, pool), "VALID")

    expected = derivatives(usual, params, x)
    assert 0.05 < np.mean(np.asarray(expected[0][1]) == 0) < 0.9
    for form in ("cpu", "gpu"):
        result = derivatives(applied(layer), params, x, form)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), result, expected)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [(3, 2, 1), *thorough((2, 2, 0), (3, 3, 0), (2, 1, 0), (3, 1, 1), (5, 2, 2), (2, 3, 1))],
)
def test_max_pool_is_flax_max_pool(window, strides, padding):
    """Values and gradients, to the first of equal elements; without a scatter, which is slow on CPU and GPU."""
    x = jnp.asarray(np.random.default_rng(0).integers(-3, 3, (2, 9, 8, 5)), jnp.float32)

    def usual(x):
        return nn.max_pool(x, (window, window), (strides, strides), [(padding, padding)] * 2)

    def ours(x):
        return layers.max_pool(x, window, strides, padding)

    weights = jnp.asarray(normal(1, *usual(x).shape, dtype=np.float32))
    programs = [
        jax.jit(lambda x, f=f: (jax.value_and_grad(lambda x: jnp.sum(f(x) * weights))(x), f(x))).lower(x)
        for f in (usual, ours)
    ]
    assert ["scatter" in program.as_text() for program in programs] == [True, False]
    (of_usual, y_usual), (of_ours, y) = (program.compile()(x) for program in programs)
    np.testing.assert_array_equal(y, y_usual)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), of_ours, of_usual)

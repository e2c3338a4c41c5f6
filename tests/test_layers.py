"""The layers against Flax's, NumPy and the definitions, in both of the forms that platforms choose from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from imgclf_jax import sharding
from imgclf_jax.models import layers
from imgclf_jax.models.layers import Conv, ConvPool, conv, flatten, mirror, pool_bias_relu

SETTINGS = [  # kernel, strides, padding, dilation, groups
    (3, 1, "VALID", 1, 1),
    (3, 1, "SAME", 1, 1),
    ((3, 2), (2, 1), "SAME", 1, 1),
    ((2, 5), (1, 3), "VALID", 1, 1),
    (4, 3, ((0, 2), (3, 1)), 1, 1),
    (1, 2, "SAME", 1, 1),
    (3, 2, 1, 1, 1),
    (3, 1, "SAME", 2, 1),
    (3, 1, "SAME", 1, 2),
]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.fixture(params=[True, False], ids=["mirrored", "usual"])
def form(request, monkeypatch):
    """Runs a test in both forms, whatever the platform."""
    monkeypatch.setattr(layers, "mirrored", lambda: request.param)
    return request.param


@pytest.mark.usefixtures("float64", "form")
@pytest.mark.parametrize(("kernel", "strides", "padding", "dilation", "groups"), SETTINGS)
def test_conv_is_flax_conv(kernel, strides, padding, dilation, groups):
    """The same parameters, results and gradients as nn.Conv, in float64."""
    x, settings = jnp.asarray(normal(0, 3, 11, 9, 4)), {"kernel_dilation": dilation, "feature_group_count": groups}
    ours = Conv(6, kernel, strides, padding, **settings, dtype=jnp.float64)
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    theirs = nn.Conv(6, size, strides, padding, **settings, dtype=jnp.float64)
    params = ours.init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, theirs.init(jax.random.key(0), x)["params"])
    params = jax.tree.map(lambda p: jnp.asarray(normal(1, *p.shape)), params)

    def scalar(layer, params, x):
        y = layer.apply({"params": params}, x)
        return jnp.sum(jnp.sin(y)), y

    results = [
        jax.jit(jax.value_and_grad(functools.partial(scalar, layer), argnums=(0, 1), has_aux=True))(params, x)
        for layer in (ours, theirs)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), *results)


@pytest.mark.usefixtures("float64")
def test_conv_mirrored_is_its_definition():
    """Against loops over output positions in NumPy."""
    x, kernel = normal(0, 2, 6, 7, 3), normal(1, 3, 2, 3, 5)
    expected = np.zeros((2, 2, 6, 5))
    for i in range(2):
        for j in range(6):
            expected[:, i, j] = np.einsum("bhwc,hwcf->bf", x[:, 2 * i : 2 * i + 3, j : j + 2], kernel)
    out = conv(mirror(jnp.asarray(x)), jnp.asarray(kernel), (2, 1), "VALID", mirrored=True)
    np.testing.assert_allclose(mirror(out), expected, rtol=0, atol=1e-13)


def test_bfloat16_products_are_summed_in_float32():
    """With bfloat16 operands that are exact, sums of many terms are exact too: bfloat16 would keep 8 bits of them."""
    x = jnp.asarray(np.random.default_rng(0).integers(-3, 9, (32, 9, 9, 4)), jnp.float32)  # [c, h, w, b]
    kernel = jnp.asarray(np.random.default_rng(1).integers(-3, 4, (3, 3, 32, 8)), jnp.float32)

    def scalar(x, kernel, dtype):
        y = conv(x, kernel, padding="VALID", mirrored=True, dtype=dtype)
        return jnp.sum(y.astype(jnp.float32)), y

    run = jax.jit(jax.grad(scalar, argnums=1, has_aux=True), static_argnums=2)
    (low, y_low), (high, y_high) = run(x, kernel, jnp.bfloat16), run(x, kernel, jnp.float32)
    assert y_low.dtype == jnp.float32
    assert np.abs(y_high).max() > 256  # integers that bfloat16 cannot hold
    np.testing.assert_array_equal(y_low, y_high)
    np.testing.assert_array_equal(low, high)


@pytest.mark.parametrize(("h", "w", "window"), [(8, 8, 2), (9, 7, 2), (13, 12, 3), (5, 4, 4), (3, 6, 1), (30, 25, 12)])
@pytest.mark.parametrize("channels", [-1, 0])
def test_pool_bias_relu_is_flax_in_the_usual_order(h, w, window, channels):
    """The same bits as convolution output + bias, ReLU, nn.max_pool; the gradient too, ties among its elements."""
    x = np.random.default_rng(0).integers(-4, 5, (2, h, w, 3)).astype(np.float32)  # of few values: ties
    bias = jnp.asarray([-4.5, 0.25, 1.5])
    weights = normal(1, 2, h // window, w // window, 3, dtype=np.float32)

    def usual(x, bias):
        return nn.max_pool(nn.relu(x + bias), (window, window), (window, window), "VALID")

    def ours(x, bias):
        turn = (lambda x: x) if channels == -1 else mirror
        return turn(pool_bias_relu(turn(x), bias, window, channels, jnp.float32))

    y, y_usual = jax.jit(ours)(x, bias), jax.jit(usual)(x, bias)
    np.testing.assert_array_equal(y, y_usual)
    assert 0 < np.mean(np.asarray(y) == 0) < 1
    grads, expected = (
        jax.jit(jax.grad(lambda x, bias, f=f: jnp.sum(f(x, bias) * weights), argnums=(0, 1)))(x, bias)
        for f in (ours, usual)
    )
    # ReLU first makes all that is below zero equal, which changes where the gradient of a zero would go: nowhere.
    np.testing.assert_array_equal(grads[0], expected[0])
    np.testing.assert_allclose(grads[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("kernel", "pool"), [(3, 2), (5, 3)])
def test_conv_pool_is_convolution_bias_relu_and_pool_in_that_order(kernel, pool):
    """On the same weights, with biases of both signs, the same numbers as Flax's layers in the usual order."""
    x = jnp.asarray(normal(0, 2, 15, 14, 3, dtype=np.float32))
    layer, flax_conv = ConvPool(8, kernel, pool), nn.Conv(8, (kernel, kernel), padding="VALID")
    params = layer.init(jax.random.key(0), x)["params"]
    params = {
        "kernel": jnp.asarray(normal(1, *params["kernel"].shape, dtype=np.float32)),
        "bias": jnp.linspace(-9, 1, 8),
    }

    @jax.jit
    def usual(x):
        return nn.max_pool(nn.relu(flax_conv.apply({"params": params}, x)), (pool, pool), (pool, pool), "VALID")

    expected = usual(x)
    assert 0.05 < np.mean(np.asarray(expected) == 0) < 0.9
    np.testing.assert_allclose(jax.jit(layer.apply)({"params": params}, x), expected, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("form")
def test_flatten_is_reshape():
    x = jnp.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(flatten(x), x.reshape(2, -1))


def compiled_network(batch_size, mesh):
    """Two blocks and their gradients, the batch split over `mesh`."""
    network = nn.Sequential([ConvPool(8), ConvPool(16), flatten, nn.Dense(10)])
    x = jnp.zeros((batch_size, 28, 28, 1))
    params = network.init(jax.random.key(0), x)
    whole, split = sharding.replicated(mesh), NamedSharding(mesh, PartitionSpec("data"))
    grad = jax.grad(lambda params, x: jnp.mean(network.apply(params, x) ** 2))
    return jax.jit(grad, in_shardings=(whole, split), out_shardings=whole).lower(params, x).compile()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the mirrored form is CPU's")
def test_mirrored_layers_need_no_convolution_and_no_exchange_of_images():
    """No convolution, which CPU runs slowly in loops; split over devices, only gradients are summed."""
    program = compiled_network(16, sharding.make_mesh()).as_text()
    assert "convolution(" not in program
    assert "all-reduce" in program
    assert not any(f" {name}(" in program for name in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the mirrored form is CPU's")
def test_between_two_layers_nothing_is_transposed():
    """The mirroring of one layer's end and the next one's beginning cancel in the compiled program."""
    program = compiled_network(64, sharding.make_mesh(jax.devices()[:1])).as_text()
    assert "f32[8,13,13,64]" in program  # the images between the blocks, mirrored
    assert "f32[64,13,13,8]" not in program

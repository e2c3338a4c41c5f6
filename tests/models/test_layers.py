"""Layers, pooling and normalizations against Flax, NumPy and their definitions, in both forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from imgclf_jax.core import platform, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.models import layers, norms
from imgclf_jax.models.classifier import Classifier
from imgclf_jax.models.cpu import pool
from imgclf_jax.models.cpu.matmuls import features_first, features_last
from imgclf_jax.models.layers import Conv, ConvPool, Dense, conv
from imgclf_jax.models.norms import BatchNorm, GroupNorm, LayerNorm
from imgclf_jax.models.resnet import ResNetCIFAR

pytestmark = pytest.mark.optimized

SETTINGS = [  # kernel, strides, padding, dilation, groups, channels
    ((3, 2), (2, 1), ((0, -1), (1, 2)), (1, 2), 1, 1),
    (3, 1, "SAME", 1, 2, 4),
    *thorough(((2, 5), (1, 3), "VALID", 1, 1, 4), (3, 1, ((0, -1), (1, 2)), 1, 1, 1)),
    *thorough((3, 1, "SAME", 1, 1, 4), (4, 3, ((0, 2), (3, 1)), 1, 1, 4), (2, 3, "SAME", 1, 1, 2)),
    *thorough((3, 1, "VALID", 1, 1, 4), ((3, 2), (2, 1), "SAME", 1, 1, 4), (1, 2, "SAME", 1, 1, 4), (3, 2, 1, 1, 1, 4)),
]


def normal(seed, *shape, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def shapes(layer, *args):
    """The shapes of a layer's initial variables."""
    return jax.eval_shape(lambda: layer.init(jax.random.key(0), *args))


def applied(layer):
    """A layer as a function of its parameters and input."""
    return lambda params, x: layer.apply({"params": params}, x)


def derivatives(function, params, x, form=""):
    """((a function of y, y), its gradients by both arguments) of y = function(params, x), traced for a platform."""

    def scalar(params, x):
        y = function(params, x)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(platform.tracing_for(form)(jax.value_and_grad(scalar, (0, 1), has_aux=True)))(params, x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("kernel", "strides", "padding", "dilation", "groups", "channels"), SETTINGS)
def test_conv_is_flax_conv(kernel, strides, padding, dilation, groups, channels):
    x = jnp.asarray(normal(0, 3, 11, 9, channels))
    settings = {"kernel_dilation": dilation, "feature_group_count": groups}
    ours = Conv(6, kernel, strides, padding, **settings, dtype=jnp.float64)
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    theirs = nn.Conv(6, size, strides, padding, **settings, dtype=jnp.float64)
    params = shapes(theirs, x)["params"]
    assert jax.tree.map(jnp.shape, shapes(ours, x)["params"]) == jax.tree.map(jnp.shape, params)
    params = jax.tree.map(lambda s: normal(1, *s.shape), params)

    expected = derivatives(applied(theirs), params, x)
    for form in ("cpu", "gpu", "tpu"):
        result = derivatives(applied(ours), params, x, form)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), result, expected)


@platform.tracing_for("cpu")
def test_bfloat16_products_are_summed_in_float32():
    """With exact bfloat16 operands, sums of many terms are exact too; a bfloat16 sum would keep 8 bits."""
    x = jnp.asarray(np.random.default_rng(0).integers(-3, 9, (4, 9, 9, 32)), jnp.float32)
    kernel = jnp.asarray(np.random.default_rng(1).integers(-3, 4, (3, 3, 32, 8)), jnp.float32)

    def scalar(x, kernel, dtype):
        y = conv(x, kernel, padding="VALID", dtype=dtype)
        return jnp.sum(y.astype(jnp.float32)), y

    run = jax.jit(jax.grad(scalar, argnums=1, has_aux=True), static_argnums=2)
    (low, y_low), (high, y_high) = run(x, kernel, jnp.bfloat16), run(x, kernel, jnp.float32)
    assert y_low.dtype == jnp.float32
    assert np.abs(y_high).max() > 256  # integers that bfloat16 cannot hold
    np.testing.assert_array_equal(y_low, y_high)
    np.testing.assert_array_equal(low, high)
    grey, taps = x[..., :1] / 3, kernel[:, :, :1] / 7  # a first layer, which needs no matmul, rounds nothing
    first = jax.jit(conv, static_argnames="dtype")
    np.testing.assert_array_equal(first(grey, taps, dtype=jnp.bfloat16), first(grey, taps, dtype=jnp.float32))


def test_layers_on_cpu_need_no_convolution_and_no_exchange_of_images():
    """Convolutions are slow in loops on CPU; on several devices, only gradients are all-reduced."""
    network = nn.Sequential([ConvPool(8), ConvPool(16), lambda x: x.mean((1, 2))])
    x, mesh = jnp.zeros((16, 28, 28, 1)), sharding.make_mesh()
    params = shapes(network, x)
    whole, split = sharding.replicated(mesh), NamedSharding(mesh, PartitionSpec("data"))
    grad = jax.grad(lambda params, x: jnp.mean(network.apply(params, x) ** 2))
    jitted = jax.jit(platform.tracing_for("cpu")(grad), in_shardings=(whole, split), out_shardings=whole)
    program = jitted.lower(params, x).compile().as_text()
    assert "convolution(" not in program
    assert "all-reduce" in program
    assert not any(f" {name}(" in program for name in ("all-gather", "all-to-all", "collective-permute"))


def test_drop_path_drops_whole_examples():
    """Each with the given probability; the rest is scaled to keep the expectation."""
    out = nn.apply(lambda module, x: layers.drop_path(module, x, 0.25, True), nn.Dense(1))(
        {}, jnp.ones((4000, 2, 3)), rngs={"dropout": jax.random.key(0)}
    )
    rows = np.asarray(out).reshape(4000, -1)
    assert set(np.unique(rows)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (rows == rows[:, :1]).all()
    assert abs(np.mean(rows[:, 0] > 0) - 0.75) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    assert layers.drop_path(nn.Dense(1), out, 0.25, False) is out


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("layer", [Conv(2, 1), ConvPool(2, 1, 1), Dense(2)], ids=["conv", "conv_pool", "dense"])
def test_the_gradient_of_a_bias_is_not_rounded_to_bfloat16(layer):
    """The sum of 1,001 ones, which bfloat16 rounds to 1,000."""
    x = jnp.zeros((1001, 1, 1, 3), jnp.bfloat16)
    layer = layer.clone(dtype=jnp.bfloat16)
    params = jax.tree.map(lambda s: jnp.ones(s.shape), shapes(layer, x)["params"])
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(layer.apply({"params": params}, x).astype(jnp.float32))))(params)
    np.testing.assert_array_equal(gradient["bias"], [1001, 1001])


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


@pytest.mark.usefixtures("float64", "form")
@pytest.mark.parametrize("form", ["cpu", "gpu", "tpu"], indirect=True)
@pytest.mark.parametrize(("shape", "use_scale"), [((6, 5, 4, 3), True), *thorough(((6, 3), False), ((6, 4, 3), True))])
def test_batch_norm_is_flax_batch_norm(shape, use_scale):
    """The same parameters, statistics, results and gradients as nn.BatchNorm in float64, in training and evaluation."""
    x = jnp.asarray(normal(0, *shape)) * 3 + 1
    ours = BatchNorm(0.9, 1e-3, use_scale=use_scale, dtype=jnp.float64)
    theirs = nn.BatchNorm(
        momentum=0.9, epsilon=1e-3, use_scale=use_scale, param_dtype=jnp.float64, force_float32_reductions=False
    )
    found = shapes(theirs, x, False)
    assert jax.tree.map(jnp.shape, shapes(ours, x, True)) == jax.tree.map(jnp.shape, found)
    variables = jax.tree.map(lambda s: jnp.asarray(np.abs(normal(1, *s.shape)) + 0.1), dict(found))

    def run(layer, params, x):
        state = {"params": params, "batch_stats": variables["batch_stats"]}
        train = layer is ours  # where linen's has `use_running_average`
        y, new = layer.apply(state, x, train, mutable=["batch_stats"])
        outputs = y, layer.apply(state, x, not train)
        return jnp.sum(jnp.sin(outputs[0])) + jnp.sum(jnp.cos(outputs[1])), (outputs, new)

    results = [
        jax.jit(jax.value_and_grad(functools.partial(run, layer), argnums=(0, 1), has_aux=True))(variables["params"], x)
        for layer in (ours, theirs)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), *results)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", ["cpu", *thorough("gpu")], indirect=True)
@pytest.mark.parametrize("shape", [(3, 4, 2, 6), *thorough(((3, 5, 6),), ((3, 6),))])
def test_dense_layers_layer_and_group_norm_are_flaxs(shape, form):
    x = jnp.asarray(normal(0, *shape)) * 2 + 1
    wide = {"param_dtype": jnp.float64, "force_float32_reductions": False}
    pairs = [
        (Dense(4, jnp.float64), nn.Dense(4, dtype=jnp.float64)),
        (LayerNorm(dtype=jnp.float64), nn.LayerNorm(1e-6, **wide)),
        (GroupNorm(2, epsilon=1e-3, dtype=jnp.float64), nn.GroupNorm(2, epsilon=1e-3, **wide)),
    ]
    for ours, theirs in pairs:
        variables = shapes(theirs, x)["params"]
        assert jax.tree.map(jnp.shape, shapes(ours, x)["params"]) == jax.tree.map(jnp.shape, variables)
        params = jax.tree.map(lambda p: jnp.asarray(normal(1, *p.shape)), variables)
        results = (derivatives(applied(layer), params, x, form) for layer in (ours, theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), *results)


@pytest.mark.usefixtures("float64", "form")
@pytest.mark.parametrize("form", ["cpu", *thorough("gpu")], indirect=True)
def test_batch_norm_over_groups_is_that_of_each_group():
    """Results and gradients; the running statistics follow the mean over groups. Evaluation has no groups."""
    x = jnp.asarray(normal(0, 12, 5, 4, 3)) * 3 + 1
    layer = BatchNorm(0.9, 1e-3, dtype=jnp.float64)
    variables = jax.tree.map(lambda s: jnp.asarray(np.abs(normal(1, *s.shape)) + 0.1), shapes(layer, x, True))

    def run(params, x):
        y, new = layer.apply(variables | {"params": params}, x, True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), (y, new["batch_stats"])

    gradient = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    with norms.statistics_over(3):
        (value, (y, running)), (of_params, of_x) = gradient(variables["params"], x)
        evaluated = layer.apply(variables, x, False)
    each = [gradient(variables["params"], part) for part in np.split(np.asarray(x), 3)]
    np.testing.assert_allclose(value, sum(out[0] for out, _ in each), rtol=1e-12)
    np.testing.assert_allclose(y, np.concatenate([out[1][0] for out, _ in each]), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(of_x, np.concatenate([grads[1] for _, grads in each]), rtol=1e-8, atol=1e-12)
    mean = lambda *values: sum(values) / 3  # noqa: E731
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, mean(*b), rtol=1e-12), running,
                 *[out[1][1] for out, _ in each])  # fmt: skip
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, sum(b), rtol=1e-8), of_params,
                 *[grads[0] for _, grads in each])  # fmt: skip
    np.testing.assert_array_equal(evaluated, layer.apply(variables, x, False))


def test_groups():
    assert norms.groups("global", 256) == 1
    assert norms.groups("groups(32)", 256) == 8
    for text, message in (("groups(33)", "256 images do not divide into groups of 33"), ("local", "allowed are")):
        with pytest.raises(UserError, match=message):
            norms.groups(text, 256)


@pytest.mark.parametrize(("norm", "expected"), [(nn.BatchNorm, True), (BatchNorm, False)])
def test_linens_batch_norm_is_found(norm, expected):
    """The key batch_norm='groups(8)' does not reach it, which a run warns of."""
    backbone = ResNetCIFAR(8, norm=norm)
    assert norms.uses_linen_batch_norm(Classifier(backbone, 3), (8, 8, 3)) == expected

"""Forward passes on CPU: plain XLA operations, which oneDNN computes where jaxlib has it."""

import platform as host

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import programs, thorough
from jax import lax
from jax.test_util import check_grads
from test_forms import SMALL, random_variables

from imgclf_jax.core import internals, platform
from imgclf_jax.models import classifier, layers
from imgclf_jax.models.cpu import onednn

pytestmark = [
    pytest.mark.skipif(host.machine() not in ("x86_64", "AMD64"), reason="jaxlib has oneDNN only on x86"),
    pytest.mark.usefixtures("shallow"),
]


@pytest.mark.optimized
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["cnn", "resnet_cifar", *thorough(*sorted({*SMALL} - {"cnn", "resnet_cifar"}))])
def test_onednn_gives_what_the_same_network_gives_in_float64(name, precision):
    """And computes it: a new jaxlib that ignores the options would be slow without a word."""
    text, size = SMALL[name]
    images = np.random.default_rng(0).normal(size=(16, size, size, 3)).astype(np.float32)
    model = classifier.build(text, 4, precision)
    variables = random_variables(model, images)
    with jax.enable_x64():
        exact = classifier.build(text, 4, "float64").clone(dtype=jnp.float64)
        wide = jax.tree.map(lambda x: x.astype(np.float64), (variables, images))
        expected = np.asarray(jax.jit(lambda v, x: exact.apply(v, x))(*wide))
    with platform.tracing_for("cpu", onednn=True), internals.not_cached():
        jitted = jax.jit(lambda v, x: model.apply(v, x), compiler_options=platform.ONEDNN_OPTIONS)
        compiled = jitted.lower(variables, images).compile()
    small = name in ("mlp", "rnn")  # matmuls that XLA computes itself; not every x86 has bfloat16
    assert "__onednn" in compiled.as_text() or small or precision == "bfloat16"
    error = np.abs(compiled(variables, images) - expected).max() / np.abs(expected).max()
    assert error < (1e-4 if precision == "float32" else 0.05)


def in_a_loop_with_a_reference(function):
    def written(x, w):
        reference = jax.new_ref(jnp.zeros_like(x))

        def body(i, y):
            reference[...] = function(y, w)
            return y

        lax.fori_loop(0, 2, body, x)
        return reference[...]

    return written


@pytest.mark.optimized
@pytest.mark.parametrize("wrap", [jax.checkpoint, in_a_loop_with_a_reference])
def test_a_matmul_with_two_readers_inside_of_any_primitive(wrap):
    """jaxlib 0.12 fuses the sigmoid into the matmul, and the sum gets it too: an error of half the values."""

    def silu_and_itself(x, w):
        y = x @ w
        return jax.nn.silu(y) + y

    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(512, 384), (384, 384)]))
    expected = jax.jit(silu_and_itself)(x, w)
    for enabled, options in ((True, platform.ONEDNN_OPTIONS), (False, None)):
        with platform.tracing_for("cpu", onednn=enabled), internals.not_cached():
            found = jax.jit(wrap(silu_and_itself), compiler_options=options)(x, w)
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("groups", [2, 8])
def test_a_bfloat16_convolution_of_groups_is_computed_in_float32(groups):
    """In bfloat16 it takes up to 50 times as long, so that a ConvNeXt would be slower than without oneDNN."""
    x, kernel = jnp.ones((2, 8, 8, 8), jnp.bfloat16), jnp.ones((3, 3, 8 // groups, 8), jnp.bfloat16)
    with platform.tracing_for("cpu", onednn=True):
        program = jax.jit(lambda x, k: layers.conv(x, k, groups=groups)).lower(x, kernel).as_text()
    (line,) = (line for line in program.splitlines() if "stablehlo.convolution" in line)
    assert "bf16" not in line


# Image size, kernel size, strides, ((top, bottom), (left, right)).
CONVOLUTIONS = {
    "same": ((9, 10), (3, 3), (1, 1), ((1, 1), (1, 1))),
    "strided": ((8, 9), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "stem": ((14, 15), (7, 7), (2, 2), ((3, 3), (3, 3))),
    "shortcut": ((8, 9), (1, 1), (2, 2), ((0, 0), (0, 0))),
    "pointwise": ((6, 5), (1, 1), (1, 1), ((0, 0), (0, 0))),
    "odd_rows_of_a_patch": ((11, 9), (2, 2), (3, 3), ((0, 0), (1, 0))),
    "oblong": ((9, 8), (3, 2), (2, 1), ((0, 1), (1, 0))),
    "wide_padding": ((6, 7), (2, 1), (1, 1), ((3, 2), (1, 2))),
    "cropping": ((9, 11), (3, 3), (2, 1), ((-1, 0), (2, -2))),
    "depthwise": ((8, 9), (7, 7), (1, 1), ((3, 3), (3, 3))),
    "strided_depthwise": ((9, 8), (3, 2), (2, 3), ((1, 1), (1, 0))),
    "batch_in_parts": ((9, 8), (3, 3), (2, 1), ((1, 1), (1, 0))),
}


def _convolution(name, dtype):
    """(Images, kernel, the gradient of the outputs, the convolution as a layer computes it) in `dtype`."""
    size, kernel_size, strides, pads = CONVOLUTIONS[name]
    rng = np.random.default_rng(0)
    channels, groups = ((1, 6), 6) if name.endswith("depthwise") else ((6, 8), 1)
    batch = 40 if name == "batch_in_parts" else 4
    x, kernel = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((batch, *size, 6), (*kernel_size, *channels)))

    def conv(x, kernel):
        return layers.conv(x, kernel, strides, pads, groups=groups).astype(x.dtype)

    return x, kernel, jnp.asarray(rng.normal(size=jax.eval_shape(conv, x, kernel).shape), dtype), conv


@pytest.mark.parametrize("dtype", ["float32", *thorough("bfloat16")])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_onednn_computes_the_gradients_that_xla_derives_in_float64(name, dtype, monkeypatch):
    monkeypatch.setattr(onednn, "_CACHED", 0)  # a large batch is in parts in bfloat16 too
    x, kernel, gradient, conv = _convolution(name, dtype)

    def pulled(x, kernel, gradient):
        y, pull = jax.vjp(conv, x, kernel)
        return y, *pull(gradient)

    with jax.enable_x64():
        wide = [np.asarray(value, np.float64) for value in (x, kernel, gradient)]
        expected = jax.jit(pulled)(*wide)  # outside of `tracing_for`: lax.conv_general_dilated
    with platform.tracing_for("cpu", onednn=True), internals.not_cached():
        jitted = jax.jit(pulled, compiler_options=platform.ONEDNN_OPTIONS)
        compiled = jitted.lower(x, kernel, gradient).compile()
    if dtype == "float32" and name != "wide_padding":  # not every x86 has bfloat16; wider than the kernel is XLA's own
        assert " convolution(" not in compiled.as_text()
    for found, exact in zip(compiled(x, kernel, gradient), expected, strict=True):
        assert found.dtype == dtype
        error = np.abs(np.asarray(found, np.float64) - np.asarray(exact)).max()
        assert error < {"float32": 1e-5, "bfloat16": 0.02}[dtype] * np.abs(exact).max()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["strided", *thorough("same", "shortcut", "oblong", "cropping", "strided_depthwise")])
def test_every_derivative_of_a_convolution(name):
    x, kernel, _, conv = _convolution(name, "float64")
    with platform.tracing_for("cpu", onednn=True):
        check_grads(conv, (x, kernel), order=2, modes=("fwd", "rev"))


@pytest.mark.thorough
def test_which_networks_train_on_onednn():
    """All but `cnn`; several seeds train in one `vmap`, whose grouped convolutions would be slow there."""
    for model, seeds, expected in (("resnet_cifar(8)", 1, True), ("resnet_cifar(8)", 2, False), ("cnn", 1, False)):
        text = programs((16, 16, 3), model=model, num_seeds=seeds).traced_train.lower().as_text()
        assert ("stablehlo.convolution" in text) == expected

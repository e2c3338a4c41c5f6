"""Forward passes on CPU: plain XLA operations, which oneDNN computes where jaxlib has it."""

import platform as host

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from jax import lax
from test_forms import SMALL, random_variables

from imgclf_jax.core import internals, platform
from imgclf_jax.models import classifier, layers

pytestmark = [
    pytest.mark.skipif(host.machine() not in ("x86_64", "AMD64"), reason="jaxlib has oneDNN only on x86"),
    pytest.mark.usefixtures("shallow"),
]


@pytest.mark.optimized
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["cnn", "resnet_cifar", *thorough(*sorted({*SMALL} - {"cnn", "resnet_cifar"}))])
def test_onednn_gives_what_the_same_network_gives_in_float64(name, precision):
    """And computes it: a new jaxlib that ignores the options would be slow without a word.

    Plain `jax.jit` gives NaN for the ResNet in bfloat16 (jaxlib 0.12.0): YNNPACK fuses the matmuls into the mean.
    """
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
    for onednn, options in ((True, platform.ONEDNN_OPTIONS), (False, None)):
        with platform.tracing_for("cpu", onednn=onednn), internals.not_cached():
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

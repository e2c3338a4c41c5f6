"""The CPU rewrite keeps results, with fewer transposes and roundings."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from imgclf_jax.models.cpu.layout import features_first, features_last
from imgclf_jax.models.cpu.rewrite import rewrite

SHAPE = (2, 4, 3, 6)

# Functions of an array [b, h, w, c] that a network may hold between two layers; most are known to the rewrite.
OPS = {
    "layer": lambda x: features_last(jnp.sort(features_first(x), 0)),  # sorting is unknown to it
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "scale": lambda x: x * jnp.linspace(0.5, 1.5, x.shape[-1]).astype(x.dtype) + 0.25,
    "by_example": lambda x: x * jnp.linspace(0.5, 1.5, x.shape[0]).astype(x.dtype)[:, None, None, None],
    "centre": lambda x: x - jnp.mean(x, (1, 2), keepdims=True),
    "softmax": lambda x: jax.nn.softmax(x, -1),
    "standard": lambda x: jax.nn.standardize(x, (0, 1, 2)),
    "transpose": lambda x: jnp.swapaxes(x, 1, 2),
    "reverse": lambda x: x[:, ::-1],
    "concatenate": lambda x: jnp.concatenate([x, x * 2], -1)[..., 1::2],
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1],
    "split": lambda x: x.reshape(*x.shape[:3], 2, -1).sum(3).repeat(2, -1),
    "merge": lambda x: (x.reshape(x.shape[0], -1, x.shape[-1]) * 2).reshape(x.shape),
    "where": lambda x: jnp.where(x > jnp.max(x, -1, keepdims=True) * 0.5, x, 0),
    "order": lambda x: x + jnp.argmax(x, -1, keepdims=True).astype(x.dtype),
    "barrier": lax.optimization_barrier,
    "loop": lambda x: lax.fori_loop(0, 2, lambda i, y: OPS["layer"](y) * 0.5, x),
    "scan": lambda x: lax.scan(lambda y, z: (features_last(features_first(y) + z[0]), z), x, jnp.ones((2, 1), x.dtype))[
        0
    ],
    "branch": lambda x: lax.cond(jnp.sum(x) > 0, OPS["layer"], jax.nn.relu, x),
    "remat": lambda x: jax.checkpoint(OPS["layer"])(x),
    "product": lambda x: jnp.einsum("bhwc,dc->bhwd", x, jnp.eye(x.shape[-1], dtype=x.dtype)),
    "gather": lambda x: x[..., jnp.asarray([*range(1, x.shape[-1]), 0])],
}


def network(names):
    return lambda x: functools.reduce(lambda x, name: OPS[name](x), names, x)


@settings(max_examples=8)
@given(st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=6), st.integers(0, 2**31))
@pytest.mark.usefixtures("float64")
def test_any_sequence_of_operations_and_its_gradient_are_unchanged(names, seed):
    x = np.random.default_rng(seed).normal(size=SHAPE)
    function = jax.value_and_grad(lambda x: (jnp.sum(jnp.sin(y := network(names)(x))), y), has_aux=True)
    if "loop" in names:  # which cannot be differentiated
        function = network(names)
    ours, as_written = jax.jit(rewrite(function))(x), jax.jit(function)(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), ours, as_written)


@pytest.mark.thorough
@settings(max_examples=8)
@given(st.lists(st.sampled_from(sorted(set(OPS) - {"order", "where", "gelu"})), min_size=1, max_size=6))
def test_in_bfloat16_roundings_are_left_out_and_dtypes_stay(names):
    """The result is as close to float64 as that of the program as written, up to one rounding."""
    x = np.random.default_rng(0).normal(size=SHAPE)
    low = jnp.asarray(x, jnp.bfloat16)
    as_written, ours = network(names)(low), rewrite(network(names))(low)
    assert ours.dtype == as_written.dtype == jnp.bfloat16
    assert ours.shape == as_written.shape
    with jax.enable_x64(True):
        exact = np.asarray(network(names)(jnp.asarray(low.astype(jnp.float32), jnp.float64)))
    error, usual = (np.abs(np.asarray(y, np.float64) - exact).max() for y in (ours, as_written))
    assert error <= 2 * usual + 2**-7 * np.abs(exact).max()


def equations(function, *args):
    return str(jax.make_jaxpr(function)(*args))


def test_between_layers_no_transpose_is_left():
    """A residual block's operations between two layers; only the transposes of whole arrays at both ends remain."""
    names = ["layer", "relu", "scale", "centre", "pad", "concatenate", "layer", "standard", "layer"]
    whole = re.compile(r"(?:2,4,3,6|6,4,3,2)\] = transpose")
    x = jnp.ones(SHAPE)
    assert len(whole.findall(equations(network(names), x))) == 6
    assert len(whole.findall(equations(rewrite(network(names)), x))) == 2


def test_between_products_bfloat16_is_rounded_once():
    """To float32 for the arithmetic, and back where the last result is read."""
    x = jnp.ones(SHAPE, jnp.bfloat16)
    text = equations(rewrite(network(["relu", "scale", "by_example", "layer"])), x)
    assert text.count("new_dtype=bfloat16") == 1
    assert "bf16" not in [line.split(":")[1].split("[")[0] for line in text.splitlines() if " mul " in line]


def test_what_was_written_out_is_read_again():
    """A value that a matmul reads in bfloat16 is not also stored in float32 for later readers."""

    def block(x):
        y = jax.nn.relu(x * 2)
        return OPS["layer"](y) + y

    x = jnp.ones(SHAPE, jnp.bfloat16)
    text = equations(rewrite(block), x)
    assert text.count("new_dtype=bfloat16") == 2  # y, once; and the result
    assert text.count("new_dtype=float32") == 3  # x, the layer's result, and y as it was written


def test_names_of_modules_stay_in_the_program():
    """Profiles show them."""

    def function(x):
        with jax.named_scope("block7"):
            return jax.nn.relu(OPS["layer"](x))

    assert "block7" in jax.jit(rewrite(function)).lower(jnp.ones(SHAPE)).as_text(debug_info=True)


def test_random_keys_are_turned_as_arrays_are():
    """Their dtype does not exist in NumPy: they are neither rounded nor computed with."""

    def draw(seed):
        keys = jax.random.split(jax.random.key(seed), 6).reshape(2, 3).T
        keys = jnp.broadcast_to(keys[None], (2, 3, 2))
        return jax.vmap(jax.random.normal)(keys.ravel())

    np.testing.assert_array_equal(jax.jit(rewrite(draw))(np.uint32(3)), draw(np.uint32(3)))

"""FSDP: results do not change, and no device ever holds all parameters."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from imgclf_jax.core import fsdp

WIDTH, LAYERS = 256, 6


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()), ("fsdp",))


def shardings(mesh, axis="fsdp"):
    return lambda params: jax.tree.map(lambda x: NamedSharding(mesh, P(axis) if x.ndim == 2 else P()), params)


def loss(params, model_state, x):
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer + params["bias"])
    return jnp.sum(x**2)


def gradient(params, model_state, x):
    value, grads = jax.value_and_grad(loss)(params, model_state, x)
    return value, grads


def arguments(mesh, layers):
    keys = jax.random.split(jax.random.key(0), layers)
    params = {"layers": [jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for k in keys], "bias": jnp.ones(WIDTH)}
    params = jax.device_put(params, shardings(mesh)(params))
    return params, {}, jax.device_put(jax.random.normal(jax.random.key(1), (16, WIDTH)), NamedSharding(mesh, P("fsdp")))


def step(gradient):
    def updated(params, model_state, x):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient(params, model_state, x)[1])

    return updated


@functools.cache
def compiled(mesh, layers):
    own, args = step(fsdp.gather_at_use(gradient, shardings(mesh), returns_gradients=True)), arguments(mesh, layers)
    return jax.jit(own, out_shardings=shardings(mesh)(args[0])).lower(*args).compile()


def test_the_gradients_are_the_same(mesh):
    args = arguments(mesh, LAYERS)
    own, expected = compiled(mesh, LAYERS)(*args), jax.jit(step(gradient))(*jax.device_put(args, jax.devices()[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), own, jax.device_get(expected))


def test_more_layers_take_no_more_memory_than_their_shards(mesh):
    """One more layer adds an eighth of its gradient and its activations to the temporaries, never the whole layer."""
    few, more = (compiled(mesh, layers).memory_analysis().temp_size_in_bytes for layers in (LAYERS, 2 * LAYERS))
    shard, activations = 4 * WIDTH * WIDTH // 8, 4 * WIDTH * 16 // 8
    assert more - few < LAYERS * 1.2 * (shard + 2 * activations)


def test_a_layer_is_gathered_again_for_its_gradient(mesh):
    """Except the first layer, which passes no gradient on to the images."""
    assert len(re.findall(r" all-gather\(", compiled(mesh, LAYERS).as_text())) == 2 * LAYERS - 1


def jaxpr_of(function, mesh, *args):
    return str(jax.make_jaxpr(fsdp.gather_at_use(function, shardings(mesh)))(*args))


def test_a_cast_to_fewer_bytes_comes_before_the_gather(mesh):
    params, x = jax.ShapeDtypeStruct((64, 64), "float32"), jax.ShapeDtypeStruct((16, 64), "bfloat16")
    text = jaxpr_of(lambda p, _, x: x @ p.T.astype(jnp.bfloat16), mesh, params, {}, x)
    assert text.index("convert_element_type") > 0
    text = jaxpr_of(lambda p, _, x: x @ p.astype(jnp.bfloat16), mesh, params, {}, x)
    cast = text.index("convert_element_type")
    assert "P()" in text[cast:], text
    assert "P()" not in text[:cast], text


def stacked(params, model_state, x):
    """Layers in a loop, like those of `nn.scan`."""
    return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, params)[0]


FUNCTIONS = {
    "shared between layers": lambda p, s, x: jnp.tanh(x @ p) @ p.T,
    "normalized": lambda p, s, x: x @ (p / jnp.linalg.norm(p, axis=0)),
    "masked by a key": lambda p, s, x: x @ (p * jax.random.uniform(jax.random.key(0), p.shape)),
    "beside a state": lambda p, s, x: x @ (p * s["scale"]) + s["scale"],
    "a product of parameters": lambda p, s, x: x @ (p @ p),
    "penalized": lambda p, s, x: jnp.sum(x @ p) + jnp.sum(p**2),
    "returned": lambda p, s, x: (p, p.T, x @ p),
    "in a checkpoint": lambda p, s, x: jax.checkpoint(lambda x, p: jnp.tanh(x @ p))(x, p),
    "in a condition": lambda p, s, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ p, lambda: x @ p.T),
    "in a function of its own": lambda p, s, x: jax.jit(lambda x, p: jax.nn.gelu(x @ p))(jax.nn.relu(x), p),
    "in a loop": lambda p, s, x: stacked(jnp.stack([p, p.T]), s, x),
}


QUICK = ("in a loop", "returned")


@pytest.mark.parametrize("name", [*QUICK, *thorough(*(name for name in FUNCTIONS if name not in QUICK))])
def test_any_use_of_a_parameter(mesh, name):
    """Values and gradients, however a program uses its parameters."""
    function = FUNCTIONS[name]
    params = jax.random.normal(jax.random.key(0), (16, 16)) / 4
    args = params, {"scale": jnp.float32(2)}, jax.random.normal(jax.random.key(1), (8, 16))

    def scalar(params, model_state, x):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(function(params, model_state, x)))

    for of, gives in ((function, False), (lambda *args: (0, jax.grad(scalar)(*args)), True)):
        own = jax.jit(fsdp.gather_at_use(of, shardings(mesh), returns_gradients=gives))(*args)
        expected = jax.jit(of)(*args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), own, expected)

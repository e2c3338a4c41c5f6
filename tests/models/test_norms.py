"""Normalizations, and dense layers on tokens, against Flax in float64, in both forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from flax import linen as nn
from test_layers import applied, derivatives, normal, shapes

from imgclf_jax.core.errors import UserError
from imgclf_jax.models import norms
from imgclf_jax.models.classifier import Classifier
from imgclf_jax.models.layers import Dense
from imgclf_jax.models.norms import BatchNorm, GroupNorm, LayerNorm
from imgclf_jax.models.resnet import ResNetCIFAR


@pytest.mark.usefixtures("float64", "form")
@pytest.mark.parametrize("form", ["cpu", "gpu", "tpu"], indirect=True)
@pytest.mark.parametrize(("shape", "use_scale"), [((6, 5, 4, 3), True), ((6, 3), False), *thorough(((6, 4, 3), True))])
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
@pytest.mark.parametrize("shape", [(3, 5, 6), (3, 4, 2, 6), *thorough(((3, 6),))])
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

"""Rematerialization by name: the same parameters, results and gradients, for more computation and less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from test_forms import FORMS, SMALL, build

from imgclf_jax.core import platform
from imgclf_jax.core.jaxprs import matmul_flops

pytestmark = pytest.mark.usefixtures("shallow")


@pytest.fixture
def twice(request, monkeypatch):
    """(Function of the parameters → logits, parameters) without and with it."""
    name, precision = request.param
    plain = build(name, precision)
    text, *more = SMALL[name]
    monkeypatch.setitem(SMALL, name, (text.replace(")", ", remat='block')"), *more))
    return plain, build(name, precision)


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
@pytest.mark.parametrize("twice", [(n, "float64") for n in ("convnext", "mixer", "resnet", "vit")], indirect=True)
def test_the_gradients_are_the_same(twice):
    """In both forms, also with dropout and stochastic depth; parameters keep their names."""
    (plain, params), (again, same) = twice
    assert jax.tree.structure(params) == jax.tree.structure(same)
    for form in FORMS:
        expected, ours = (
            jax.jit(platform.tracing_for(form)(jax.value_and_grad(lambda p, f=f: jnp.sum(jnp.sin(f(p))))))(params)
            for f in (plain, again)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), ours, expected)


@pytest.mark.parametrize(
    "twice", [("resnet", "float32"), ("vit", "float32"), *thorough((("convnext", "float32"),))], indirect=True
)
def test_forward_products_are_computed_again(twice):
    """At most once: a third more matmuls in a gradient, less where a block's last matmul is not needed."""
    (plain, params), (again, _) = twice
    before, after = (
        matmul_flops(jax.make_jaxpr(platform.tracing_for("gpu")(jax.grad(lambda p, f=f: jnp.sum(f(p)))))(params))
        for f in (plain, again)
    )
    assert 1.1 < after / before < 4 / 3 + 0.02

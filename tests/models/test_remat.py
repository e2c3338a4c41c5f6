"""Rematerialization by name: the same parameters, results and gradients, for more computation and less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from test_forms import FORMS, SMALL, build

from imgclf_jax.core import platform
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.jaxprs import matmul_flops
from imgclf_jax.models import classifier

NAMES = ["convnext", "mixer", "resnet", "vit"]

pytestmark = pytest.mark.usefixtures("shallow")


def twice(name, monkeypatch, precision):
    """(logits, parameters) without and with it."""
    plain = build(name, precision)
    text, *more = SMALL[name]
    monkeypatch.setitem(SMALL, name, (text.replace(")", ", remat='block')"), *more))
    return plain, build(name, precision)


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_are_the_same(name, monkeypatch):
    """In both forms, also with dropout and stochastic depth; parameters keep their names."""
    (plain, params), (again, same) = twice(name, monkeypatch, "float64")
    assert jax.tree.structure(params) == jax.tree.structure(same)
    for form in FORMS:
        expected, ours = (
            jax.jit(platform.tracing_for(form)(jax.value_and_grad(lambda p, f=f: jnp.sum(jnp.sin(f(p))))))(params)
            for f in (plain, again)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), ours, expected)


@pytest.mark.parametrize("name", ["resnet", "vit", *thorough("convnext", "mixer")])
def test_forward_products_are_computed_again(name, monkeypatch):
    """At most once: a third more matmuls in a gradient, less where a block's last matmul is not needed."""
    (plain, params), (again, _) = twice(name, monkeypatch, "float32")
    before, after = (
        matmul_flops(jax.make_jaxpr(gradient)(params))
        for gradient in (platform.tracing_for("gpu")(jax.grad(lambda p, f=f: jnp.sum(f(p)))) for f in (plain, again))
    )
    assert 1.1 < after / before < 4 / 3 + 0.02


def test_other_names_are_refused():
    model = classifier.build("vit('Ti', patch=8, remat='blocks')", 4, "float32")
    with pytest.raises(UserError, match=r"remat='blocks': allowed are '' \(store all activations\) and 'block'"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))

"""The head and the layer before it: initialization and results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgclf_jax.core.errors import UserError
from imgclf_jax.models import classifier, vit

VIT = "vit('Ti', patch=8, positions='sincos', pool='mean', representation={})"
IMAGES = jnp.asarray(np.random.default_rng(0).random((2, 16, 16, 3), np.float32))


def head(text, classes=300):
    variables = classifier.build(text, classes, "float32").init(jax.random.key(3), IMAGES[:1], train=False)
    return variables["params"]["head"]


@pytest.mark.parametrize(("head_init", "deviation", "most"), [
    ("", (2 / (400 + 300)) ** 0.5, (6 / (400 + 300)) ** 0.5),
    ("glorot_uniform", (2 / (400 + 300)) ** 0.5, (6 / (400 + 300)) ** 0.5),
    ("normal(0.01)", 0.01, 0.1),
    ("pytorch_linear", 400**-0.5 / 3**0.5, 400**-0.5),
    ("zeros", 0.0, 0.0),
])  # fmt: skip
def test_how_the_head_begins(head_init, deviation, most):
    """The standard deviation and largest value of 400 × 300 weights; the bias starts at zero."""
    own = f", head_init={head_init!r}" if head_init else ""
    params = head(f"mlp(widths=(400,){own})")
    assert params["kernel"].shape == (400, 300)
    np.testing.assert_allclose(params["kernel"].std(), deviation, rtol=0.01)
    assert np.abs(params["kernel"]).max() <= most
    np.testing.assert_array_equal(params["bias"], 0)


@pytest.mark.parametrize(("head_init", "message"), [
    ("'zero'", "unknown head_init 'zero': did you mean 'zeros'"),
    ("'normal(1, 2, 3, 4)'", "in head_init 'normal.*too many positional arguments"),
    ("0", "head_init=0 must be in quotes, such as 'zeros'"),
])  # fmt: skip
def test_another_beginning_is_refused(head_init, message):
    with pytest.raises(UserError, match=message):
        classifier.build(f"mlp(head_init={head_init})", 3, "float32")


@pytest.mark.thorough
def test_the_representation_is_a_dense_layer_and_tanh(monkeypatch):
    """On the features of the network without it, which has the other parameters."""
    monkeypatch.setitem(vit._VIT, "Ti", (48, 2, 3))
    with_it, without = (classifier.build(VIT.format(on), 3, "float32").backbone for on in (True, False))
    params = jax.jit(with_it.init)(jax.random.key(0), IMAGES)["params"]
    layer = params["representation"]
    assert {k: v.shape for k, v in layer.items()} == {"kernel": (48, 48), "bias": (48,)}
    rest = {k: v for k, v in params.items() if k != "representation"}
    shapes = jax.eval_shape(without.init, jax.random.key(0), IMAGES)["params"]
    assert jax.tree.map(jnp.shape, rest) == jax.tree.map(jnp.shape, shapes)
    features = np.asarray(jax.jit(without.apply)({"params": rest}, IMAGES), np.float64)
    expected = np.tanh(features @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64))
    np.testing.assert_allclose(jax.jit(with_it.apply)({"params": params}, IMAGES), expected, atol=1e-5)

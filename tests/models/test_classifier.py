"""The head and the layer before it: initialization and results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

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
])  # fmt: skip
def test_another_beginning_is_refused(head_init, message):
    with pytest.raises(UserError, match=message):
        classifier.build(f"mlp(head_init={head_init})", 3, "float32")


@pytest.mark.parametrize(("text", "message"), [
    ("mlp(dropout=1.5)", r"model='mlp\(dropout=1.5\)': dropout=1.5 must be a number from 0 to below 1"),
    ("mlp(dropout=-0.1)", "dropout=-0.1 must be a number"),
    ("vit('Ti', patch=4, drop_path=1)", "drop_path=1 must be a number"),
    ("test_classifier:no_class", "model 'test_classifier:no_class': missing a required argument: 'x'"),
    ("test_classifier:AN_INSTANCE", "model 'test_classifier:AN_INSTANCE': missing a required argument: 'x'"),
    ("fractions:Fraction", "is a Fraction, not a flax.linen.Module or an nnx.Module"),
])  # fmt: skip
def test_a_backbone_that_cannot_be_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        classifier.build(text, 3, "float32")


class Returns(nn.Module):
    """Calls `function` on the images; has no parameters."""

    function: object = None

    @nn.compact
    def __call__(self, x, train=False):
        return self.function(x)


def no_class(x, train=False):
    return x


AN_INSTANCE = Returns()


@pytest.mark.parametrize(("function", "returned"), [
    (lambda x: x, r"float32\[2, 16, 16, 3\]"),
    (lambda x: x.mean((1, 2, 3)), r"float32\[2\]"),
    (lambda x: x.mean((0, 1)), r"float32\[16, 3\]"),
    (lambda x: (x, x), "a tuple"),
    (lambda x: None, "a NoneType"),
    (lambda x: {"features": x}, "a dict"),
])  # fmt: skip
def test_what_a_backbone_returns_instead_of_features_is_said(function, returned):
    model = classifier.Classifier(Returns(function), 3)
    says = rf"^the backbone returns {returned}; it must return features \[b, d\], here \[2, d\]"
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES)


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

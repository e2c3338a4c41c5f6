"""The head and the layer before it: initialization and results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from imgclf_jax.models import classifier

IMAGES = jnp.asarray(np.random.default_rng(0).random((2, 16, 16, 3), np.float32))


@pytest.mark.parametrize(("head_init", "deviation", "most"), [
    ("", (2 / (400 + 300)) ** 0.5, (6 / (400 + 300)) ** 0.5),
    ("normal(0.01)", 0.01, 0.1),
    ("pytorch_linear", 400**-0.5 / 3**0.5, 400**-0.5),
    ("zeros", 0.0, 0.0),
])  # fmt: skip
def test_how_the_head_begins(head_init, deviation, most):
    """The standard deviation and largest value of 400 × 300 weights; the bias starts at zero."""
    own = f", head_init={head_init!r}" if head_init else ""
    model = classifier.build(f"mlp(widths=(400,){own})", 300, "float32")
    params = model.init(jax.random.key(3), IMAGES[:1], train=False)["params"]["head"]
    assert params["kernel"].shape == (400, 300)
    np.testing.assert_allclose(params["kernel"].std(), deviation, rtol=0.01)
    assert np.abs(params["kernel"]).max() <= most
    np.testing.assert_array_equal(params["bias"], 0)


class Returns(nn.Module):
    """Calls `function` on the images; has no parameters."""

    function: object = None

    @nn.compact
    def __call__(self, x, train=False):
        return self.function(x)


@pytest.mark.parametrize(("function", "returned"), [
    (lambda x: x, r"\[2, 16, 16, 3\]"),
    (lambda x: x.mean((0, 1)), r"\[16, 3\]"),
    (lambda x: (x, x), "a tuple"),
])  # fmt: skip
def test_what_a_backbone_returns_instead_of_features_is_said(function, returned):
    model = classifier.Classifier(Returns(function), 3)
    says = rf"^the backbone returns {returned}; it must return features \[b, d\], here \[2, d\]"
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES)

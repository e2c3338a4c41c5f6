"""`export` compares the file with the model before it writes it."""

import numpy as np
import pytest
from test_stablehlo import made

from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.export import compared


@pytest.mark.thorough
def test_a_wrong_translation_of_a_network_that_is_sure_is_found():
    """Both are confident about every random image, so their probabilities agree to six digits."""
    model, _ = made("mlp(widths=(8,))")
    params = model.state.params
    head = params["head"] | {"kernel": params["head"]["kernel"] * 0, "bias": params["head"]["bias"] * 0}

    def sure(bias):
        own = head | {"bias": head["bias"].at[:].set(np.float32(bias))}
        return model._replace(state=model.state.replace(params=params | {"head": own}))

    def run(other):
        def outputs(images):
            padded = np.zeros((8, *images.shape[1:]), np.uint8)
            padded[: len(images)] = images
            return np.asarray(other.programs.inference("predict")(*other.state.evaluated, padded))[: len(images)]

        return outputs

    right, wrong = sure([40, 3, 2, 1, 0]), sure([40, 0, 3, 2, 1])
    probabilities = [np.asarray(m.predict(np.zeros((2, 8, 8, 1), np.uint8))) for m in (right, wrong)]
    np.testing.assert_allclose(*probabilities, atol=1e-6)
    assert compared.difference(run(right), right, "predict", "X") == 0
    with pytest.raises(UserError, match=r"^export: X's log probabilities differ from the model's by up to 3, "):
        compared.difference(run(wrong), right, "predict", "X")
    with pytest.raises(UserError, match="by up to nan"):
        compared.difference(lambda images: np.full((len(images), 5), np.nan, np.float32), right, "predict", "X")


@pytest.mark.thorough
def test_a_sigmoid_may_be_off_as_that_of_onnxruntime_is():
    """By 2e-7, which the logarithm of a small probability does not tolerate; another probability is found."""
    model, images = made("mlp(widths=(8,))")
    model.config.loss = "sigmoid"
    head = model.state.params["head"]
    low = head | {"kernel": head["kernel"] * 0, "bias": head["bias"].at[:].set(np.float32([-9, -3, 0, 3, -9]))}
    model = model._replace(state=model.state.replace(params=model.state.params | {"head": low}))
    right = np.asarray(model.predict(images[:5]))
    assert compared.difference(lambda images: right + np.float32(2e-7), model, "predict", "X") < 3e-7
    with pytest.raises(UserError, match="log probabilities differ"):
        compared.difference(lambda images: right + np.float32(1e-4), model, "predict", "X")

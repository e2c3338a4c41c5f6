"""Parts of the convolutional networks by their definitions in NumPy, and each family at a small width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_forms import SMALL, random_variables

from imgclf_jax.models import classifier
from imgclf_jax.models.convnext import GRN
from imgclf_jax.models.layers import SqueezeExcite, he_conv

X = np.random.default_rng(0).normal(size=(2, 7, 8, 16)).astype(np.float32)


def test_global_response_normalization():
    """Equations 1 to 3 of ConvNeXt V2; a channel of zeros has finite gradients."""
    x, scale, bias = X * (np.arange(16) != 3), X[0, 0, 0], X[0, 0, 1]
    norm = np.sqrt((x**2).sum((1, 2), keepdims=True))
    expected = scale * x * norm / (norm.mean(-1, keepdims=True) + 1e-6) + bias + x
    run = lambda x: GRN().apply({"params": {"scale": scale, "bias": bias}}, x)  # noqa: E731
    np.testing.assert_allclose(run(x), expected, atol=1e-5)
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(jnp.sin(run(x))))(x)))


def test_squeeze_and_excitation():
    v = random_variables(SqueezeExcite(4), X)["params"]
    hidden = np.maximum(X.mean((1, 2)) @ v["reduce"]["kernel"][0, 0] + v["reduce"]["bias"], 0)
    gate = 1 / (1 + np.exp(-(hidden @ v["expand"]["kernel"][0, 0] + v["expand"]["bias"])))
    np.testing.assert_allclose(SqueezeExcite(4).apply({"params": v}, X), X * gate[:, None, None], atol=1e-5)


@pytest.mark.parametrize(("kernel", "strides"), [(3, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("padding", ["SAME", None])
def test_padding_as_in_tensorflow_and_in_pytorch(kernel, strides, padding):
    """SAME: ceil(n / s) outputs, the odd pixel of padding behind; else (k - 1) / 2 pixels on each side."""
    layer = he_conv(16, kernel, strides, jnp.float32, "conv", groups=16, padding=padding)
    w = random_variables(layer, X)["params"]["kernel"]
    pads = [(kernel // 2,) * 2 for _ in (7, 8)]
    if padding:
        total = [max((-(-n // strides) - 1) * strides + kernel - n, 0) for n in (7, 8)]
        pads = [(t // 2, t - t // 2) for t in total]
    padded = np.pad(X, ((0, 0), *pads, (0, 0)))
    h, w_out = ((n - kernel) // strides + 1 for n in padded.shape[1:3])
    expected = sum(
        padded[:, i : i + strides * h : strides, j : j + strides * w_out : strides][:, :h, :w_out] * w[i, j, 0]
        for i in range(kernel) for j in range(kernel))  # fmt: skip
    np.testing.assert_allclose(layer.apply({"params": {"kernel": w}}, X), expected, atol=1e-5)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("spec", [*(SMALL[name][0] for name in ("efficientnet", "mobilenet", "regnety", "squeezenet")),
                                  "mobilenet('V3-L')", "resnet(18, variant='D')", "convnext('V2-Atto')"])  # fmt: skip
def test_each_family_tells_images_apart(spec):
    images = np.random.default_rng(1).normal(size=(3, 33, 38, 3)).astype(np.float32)
    model = classifier.build(spec, 4, "float32")
    logits = np.asarray(jax.jit(model.apply)(random_variables(model, images), images))
    assert logits.shape == (3, 4)
    assert np.all(np.isfinite(logits))
    assert np.ptp(logits, axis=0).max() > 1e-3

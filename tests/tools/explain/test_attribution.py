"""Grad-CAM and occlusion against their definitions, in NumPy; the colors and words of a heatmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from flax import linen as nn

from imgclf_jax.core.errors import UserError
from imgclf_jax.models.backbones import CNN, MLP, RNN
from imgclf_jax.models.classifier import Classifier
from imgclf_jax.models.layers import Conv, mean_pool
from imgclf_jax.models.resnet import ResNet, ResNetCIFAR
from imgclf_jax.models.vit import Mixer, ViT
from imgclf_jax.tools.explain import attribution

SHAPE = (8, 8, 1)
LABELS = np.array([2, 0, 1], np.int32)


class OneConv(nn.Module):
    """A user's own network: one layer of feature maps, and their means."""

    @nn.compact
    def __call__(self, x, train=False):
        return mean_pool(nn.relu(Conv(4, 3, padding="VALID", name="conv")(x)))


def scaled(key, images):
    return images.astype(jnp.float32) / 128 - 1


def images(n=3, shape=SHAPE):
    return np.random.default_rng(0).integers(256, size=(n, *shape), dtype=np.uint8)


def made(backbone, seed=0):
    """A classifier and random variables, so that no part is zero."""
    model, rng = Classifier(backbone, 3), np.random.default_rng(seed)
    return model, jax.tree.map(lambda x: rng.normal(0.1, 0.5, x.shape).astype(np.float32), shapes(model))


def shapes(model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False))


def split(variables):
    return variables["params"], {name: of for name, of in variables.items() if name != "params"}


def gradcam(model, variables, num_seeds=1):
    """(images, labels) → maps."""
    one = variables if num_seeds == 1 else jax.tree.map(lambda x: x[0], variables)
    layer = attribution.choose_layer(attribution.inspect(model, one, SHAPE))
    return jax.jit(functools.partial(attribution.make_gradcam(model, scaled, layer, num_seeds), *split(variables)))


def by_hand(variables, x, labels):
    """The maps of OneConv before its ReLU: y_c = mean ReLU(A_k) · head, so dy / dA_k = head_kc / places for A_k > 0."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    kernel, bias, head = *(params["backbone"]["conv"][n] for n in ("kernel", "bias")), params["head"]["kernel"]
    pixels = x / 128 - 1  # [b, 8, 8, 1]
    maps = np.zeros((len(x), 6, 6, 4))
    for i in range(6):
        for j in range(6):
            maps[:, i, j] = np.einsum("bhwc,hwck->bk", pixels[:, i : i + 3, j : j + 3], kernel) + bias
    slopes = (maps > 0) * head[:, labels].T[:, None, None] / 36
    weights = slopes.mean((1, 2))  # [b, k]
    return np.maximum((weights[:, None, None] * maps).sum(-1), 0)


@pytest.mark.parametrize("form", ["cpu", *thorough("gpu")], indirect=True)
def test_gradcam_is_its_definition(form):
    """For a network whose map can be computed by hand, in both forms of the layers, for other classes too."""
    model, variables = made(OneConv())
    explain = gradcam(model, variables)
    for labels in (LABELS, LABELS[::-1].copy()):
        maps = explain(images(), labels)
        expected = by_hand(variables, images(), labels)
        assert maps.shape == (3, 6, 6)
        assert (expected.max((1, 2)) > 0).sum() >= 2  # so that being equal says something
        np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_gradcam_of_several_seeds_is_the_mean_of_their_maps():
    model, first = made(OneConv())
    second = made(OneConv(), seed=1)[1]
    both = jax.tree.map(lambda *x: np.stack(x), first, second)
    expected = np.mean([by_hand(v, images(), LABELS) for v in (first, second)], 0)
    np.testing.assert_allclose(gradcam(model, both, 2)(images(), LABELS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backbone", "method", "layer"), [
    (CNN(widths=(4,)), "gradcam", "block0"),
    (ResNetCIFAR(depth=8), "gradcam", "layer3_0"),
    (ResNet(18, remat="block"), "gradcam", "layer1_0"),
    (MLP((4,)), "occlusion", None),
    (RNN(features=4), "occlusion", None),
    (Mixer("S", 4), "occlusion", "patch"),
    (ViT("Ti", 4), "occlusion", "patch"),
])  # fmt: skip
def test_what_a_network_shows(backbone, method, layer, shallow):
    """The method that suits it, and its last feature maps with more than one position."""
    model = attribution.without_remat(Classifier(backbone, 3))
    layers = attribution.inspect(model, shapes(model), SHAPE)
    assert attribution.best_method(layers) == method
    if layer:
        assert attribution.choose_layer(layers).name == layer
    else:
        with pytest.raises(UserError, match="--method=occlusion"):
            attribution.choose_layer(layers)


@pytest.mark.parametrize(
    ("shape", "window"), [((6, 9, 3), 0), ((1, 9, 3), 0), ((7, 7, 1), 3), ((5, 5, 1), 1), ((4, 6, 2), 4)]
)
def test_occlusion_is_a_loop_over_squares(shape, window):
    """For each pixel, the mean drop over all squares that cover it, for two images at once with two labels."""
    pair = images(2, shape)
    weights = np.random.default_rng(1).normal(size=(np.prod(shape), 3))

    def predict(batch):
        assert len(batch) <= 5
        scores = np.exp(batch.reshape(len(batch), -1) / 255 @ weights)
        return scores / scores.sum(-1, keepdims=True)

    found = attribution.occlusion(predict, pair, np.array([2, 0]), window, size=5)
    side = window or min(2, shape[0])  # more than a seventh of six pixels, which is one
    step = max(1, side // 2)
    tops, lefts = ([*range(0, n - side, step), n - side] for n in shape[:2])
    for image, label, own in zip(pair, (2, 0), found, strict=True):
        falls = [[[] for _ in range(shape[1])] for _ in range(shape[0])]
        for top in tops:
            for left in lefts:
                covered = image.copy()
                covered[top : top + side, left : left + side] = np.round(image.mean((0, 1)))
                fall = predict(image[None])[0, label] - predict(covered[None])[0, label]
                for i in range(top, top + side):
                    for j in range(left, left + side):
                        falls[i][j].append(fall)
        np.testing.assert_allclose(own, [[np.mean(of) for of in row] for row in falls], rtol=1e-9, atol=1e-12)

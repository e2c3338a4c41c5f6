"""Grad-CAM and occlusion against their definitions in NumPy, and the files and output of `explain`."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from flax import linen as nn
from PIL import Image

import imgclf_jax
import launch
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources
from imgclf_jax.data.source import read_examples
from imgclf_jax.models.backbones import CNN, MLP, RNN
from imgclf_jax.models.classifier import Classifier
from imgclf_jax.models.layers import Conv, mean_pool
from imgclf_jax.models.resnet import ResNet, ResNetCIFAR
from imgclf_jax.models.vit import Mixer, ViT
from imgclf_jax.tools.explain import attribution, explanations

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


def explained(flags, capsys):
    capsys.readouterr()
    status = launch.main(["explain", "--format=json", *flags])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.thorough
def test_explain(run, photos, capsys):
    """The class and probability of the model, the map of the pure function, and a picture of each image."""
    status, records = explained(["photos", f"--workdir={run}", "--output=heat"], capsys)
    assert status == 0
    model = imgclf_jax.load(run)
    probabilities = model.predict([record["file"] for record in records])
    assert [r["class"] for r in records] == [model.class_names[best] for best in probabilities.argmax(1)]
    assert [r["probability"] for r in records] == pytest.approx(probabilities.max(1).tolist(), abs=1e-6)
    assert {r["method"] for r in records} == {"gradcam"}
    for file in {r["picture"] for r in records}:
        with Image.open(file) as picture:
            assert picture.size[0] > 2 * 256
    assert len({r["picture"] for r in records}) == 6
    # In batches of 8, with a class for each: the maps of the pure function.
    some, labels = read_examples(sources.digits()["test"], np.arange(9))["image"], np.arange(9, dtype=np.int32)
    classifier, augment = model.programs.recipe.model, model.programs.recipe.augment(train=False)
    seen = attribution.inspect(classifier, {"params": model.state.params}, (8, 8, 1))
    pure = attribution.make_gradcam(classifier, augment, attribution.choose_layer(seen))
    found = explanations.build(model)[1](some, labels)
    np.testing.assert_allclose(found, pure(*model.state.evaluated, some, labels), atol=1e-5)


@pytest.mark.thorough
def test_explain_another_class_and_by_occlusion(run, seeds, photos, capsys):
    """For several seeds, the drop of their mean probability. Two images of one name have two figures."""
    for folder in ("x", "y"):
        shutil.copytree(photos / "unknown", photos / folder)
    flags = ["photos/x", "photos/y", f"--workdir={seeds}", "--method=occlusion", "--class=4", "--window=3"]
    status, records = explained(flags, capsys)
    assert status == 0
    assert [r["picture"] for r in records] == ["explained/0.4.occlusion.png", "explained/0.4-2.occlusion.png"]
    model = imgclf_jax.load(seeds)
    image = model.prepare("photos/x/0.png")
    [found] = attribution.occlusion(model.predict, image[None], np.array([4]), 3)
    assert records[0]["greatest"] == pytest.approx(found.max(), abs=1e-5)
    assert records[0]["probability"] == pytest.approx(model.predict(image)[0, 4], abs=1e-6)


@pytest.mark.thorough
def test_an_unknown_layer_names_the_nearest(run, photos, capsys):
    assert launch.main(["explain", "photos", "--layer=block7", f"--workdir={run}"]) == 1
    assert "unknown layer with feature maps 'block7': did you mean 'block0'" in capsys.readouterr().err

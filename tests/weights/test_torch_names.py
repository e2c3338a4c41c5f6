"""Weights of PyTorch's models give PyTorch's logits in our models: names and layouts are correct."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from torch_fixtures import draw

from imgclf_jax.core import tree
from imgclf_jax.models import classifier, convnext, resnet, vit
from imgclf_jax.weights import torch_names, vit_names

MODELS = json.loads((Path(__file__).parent / "fixtures" / "torch_models.json").read_text())

# Those without a head have its features instead of logits.
FEW = ["akamaster resnet20", "torchvision resnet basic", "torchvision vit", "timm vit dinov2", "timm vit sbb",
       "timm eva eva02 B", "open_clip vit without head", "transformers dinov3 without head",
       "transformers siglip without head"]  # fmt: skip


@pytest.fixture
def _small_variants(monkeypatch):
    """The variants of the fixtures, in place of the published ones."""
    for depth in (18, 50):
        monkeypatch.setitem(resnet._STAGES, depth, (1, 2, 1, 1))
    monkeypatch.setitem(convnext._VARIANTS, "T", ((1, 2, 1, 1), (8, 16, 24, 32)))
    monkeypatch.setitem(vit._VIT, "Ti", (48, 2, 3))
    monkeypatch.setitem(vit._MIXER, "S", (48, 2, 24, 192))


def converted(name: str) -> tuple:
    """(our model, its variables from weights drawn by PyTorch's names, images)."""
    fixture = MODELS[name]
    model = classifier.build(fixture["model"], fixture["classes"], "float32")
    images = jnp.asarray(draw("image", (2, fixture["size"], fixture["size"], 3)))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    own = dict(tree.named_leaves(variables))
    found, arrays = {}, {label: draw(label, tuple(shape)) for label, shape in fixture["shapes"].items()}
    if isinstance(model.backbone, vit.ViT):
        arrays = vit_names.joined({new: arrays[label] for label, new in vit_names.converted(arrays).items()})
    for label, array in arrays.items():
        place = torch_names.own_name(model.backbone, label, own)
        assert place is not None, label
        assert place not in found, label
        found[place] = torch_names.own_layout(array, place, own[place].shape)
    head = {
        place: np.zeros(x.shape)
        for place, x in own.items()
        if place.startswith("params/head/") and "without head" in name
    }
    assert {k: v.shape for k, v in (head | found).items()} == {k: v.shape for k, v in own.items()}  # each once, and all
    return model, tree.replace(variables, head | found), images


@pytest.mark.usefixtures("_small_variants")
@pytest.mark.parametrize("name", [*FEW, *thorough(*(name for name in MODELS if name not in FEW))])
def test_logits_are_pytorchs(name):
    model, variables, images = converted(name)
    method = "features" if "without head" in name else None
    logits = np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False, method=method))(variables, images))[:, :5]
    expected = np.array(MODELS[name]["logits"])
    assert np.ptp(expected) > 0.1  # so that being equal says something
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


SPECS = ("resnet(18)", "resnet(50)", "resnet_cifar(8)", "wide_resnet(10, 1)", "convnext('T')", "vit('Ti', patch=8)",
         "mixer('S', patch=8)")  # fmt: skip


@pytest.mark.usefixtures("_small_variants")
@pytest.mark.parametrize("spec", SPECS)
def test_our_own_names_are_read_back(spec):
    """Beside a table too; the tests of export write the libraries' names."""
    model = classifier.build(spec, 5, "float32")
    own = dict(tree.named_leaves(jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))))
    labels = torch_names.torch_names(model.backbone, own, "own")
    assert len({*labels.values()}) == len(own)
    assert {torch_names.own_name(model.backbone, label, own): label for label in labels.values()} == labels


@pytest.mark.parametrize(("spec", "names"), [
    ("convnext('T')", {  # facebookresearch/ConvNeXt's
        "downsample_layers.0.0.weight": "stem_conv/kernel", "downsample_layers.0.1.bias": "stem_norm/bias",
        "downsample_layers.3.0.weight": "downsample3_norm/scale", "stages.2.8.gamma": "stage2_8/gamma",
        "downsample_layers.3.1.weight": "downsample3_conv/kernel", "stages.2.8.dwconv.weight": "stage2_8/dwconv/kernel",
        "stages.2.8.norm.weight": "stage2_8/norm/scale", "norm.weight": "norm/scale", "stages.2.9.gamma": None,
    }),
    ("vit('Ti', patch=8)", {  # of torchvision's published files, which predate the numbers in its MLP
        "encoder.layers.encoder_layer_7.mlp.linear_1.weight": "block7/mlp/fc1/kernel",
        "encoder.layers.encoder_layer_7.mlp.linear_2.weight": "block7/mlp/fc2/kernel",
    }),
])  # fmt: skip
def test_other_names_of_published_files(spec, names):
    model = classifier.build(spec, 5, "float32")
    own = dict(tree.named_leaves(jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))))
    found = {label: torch_names.own_name(model.backbone, label, own) for label in names}
    assert found == {label: place and f"params/backbone/{place}" for label, place in names.items()}

"""Translates the parameter names and layouts of PyTorch models to those of our backbones.

Each backbone has a table of (regular expression, replacement). The first expression that matches the module's whole
name in PyTorch gives the name of our module, its parts joined by dots. The module's name is the parameter's name
without its last part (`weight`, `running_mean`, …).
"""

import re
from collections.abc import Collection

import numpy as np
from flax import linen as nn

from imgclf_jax.models.convnext import ConvNeXt
from imgclf_jax.models.resnet import ResNet, ResNetCIFAR, WideResNet
from imgclf_jax.models.vit import Mixer, ViT

Table = list[tuple[str, str]]

# torchvision and timm call the head fc, akamaster's CIFAR networks call it linear.
_RESNET: Table = [
    (r"fc|linear", "head"),
    (r"(layer\d)\.(\d+)\.downsample\.0", r"backbone.\1_\2.downsample_conv"),
    (r"(layer\d)\.(\d+)\.downsample\.1", r"backbone.\1_\2.downsample_bn"),
    (r"(layer\d)\.(\d+)\.(\w+)", r"backbone.\1_\2.\3"),
]

# xternalz/WideResNet-pytorch's.
_WIDE_RESNET: Table = [
    (r"fc", "head"),
    (r"block(\d)\.layer\.(\d+)\.convShortcut", r"backbone.layer\1_\2.shortcut"),
    (r"block(\d)\.layer\.(\d+)\.(\w+)", r"backbone.layer\1_\2.\3"),
]

# torchvision's, the authors' (facebookresearch/ConvNeXt) and timm's, in this order. torchvision numbers the stages and
# the layers between them in one list; in timm, the layers before a stage are part of it.
_CONVNEXT: Table = [
    (r"features\.0\.0|downsample_layers\.0\.0|stem\.0", "backbone.stem_conv"),
    (r"features\.0\.1|downsample_layers\.0\.1|stem\.1", "backbone.stem_norm"),
    *(
        (
            rf"features\.{2 * i}\.{k}|downsample_layers\.{i}\.{k}|stages\.{i}\.downsample\.{k}",
            f"backbone.downsample{i}_{what}",
        )
        for i in (1, 2, 3)
        for k, what in enumerate(("norm", "conv"))
    ),
    *(
        (rf"features\.{2 * i + 1}\.(\d+)\.block\.{k}", rf"backbone.stage{i}_\1.{what}")
        for i in range(4)
        for k, what in ((0, "dwconv"), (2, "norm"), (3, "pwconv1"), (5, "pwconv2"))
    ),
    *((rf"features\.{2 * i + 1}\.(\d+)", rf"backbone.stage{i}_\1") for i in range(4)),
    (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw", r"backbone.stage\1_\2.dwconv"),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc(\d)", r"backbone.stage\1_\2.pwconv\3"),
    (r"stages\.(\d)\.(?:blocks\.)?(\d+)\.(\w+)", r"backbone.stage\1_\2.\3"),
    (r"stages\.(\d)\.(?:blocks\.)?(\d+)", r"backbone.stage\1_\2"),
    (r"classifier\.0|head\.norm", "backbone.norm"),
    (r"classifier\.2|head\.fc", "head"),
]

# torchvision's, whose published files either number or name the layers of an MLP, and timm's, whose names are ours.
_VIT: Table = [
    (r"heads\.head", "head"),
    (r"conv_proj|patch_embed\.proj", "backbone.patch"),
    (r"encoder\.ln", "backbone.norm"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_(\d)", r"backbone.block\1.norm\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention", r"backbone.block\1.attn.qkv"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj", r"backbone.block\1.attn.proj"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)", r"backbone.block\1.mlp.fc1"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)", r"backbone.block\1.mlp.fc2"),
    (r"encoder", "backbone"),
    (r"blocks\.(\d+)\.(.+)", r"backbone.block\1.\2"),
]

# timm's.
_MIXER: Table = [
    (r"stem\.proj", "backbone.patch"),
    (r"blocks\.(\d+)\.(.+)", r"backbone.block\1.\2"),
]

_TABLES: dict[type, Table] = {
    ResNet: _RESNET,
    ResNetCIFAR: _RESNET,
    WideResNet: _WIDE_RESNET,
    ConvNeXt: _CONVNEXT,
    ViT: _VIT,
    Mixer: _MIXER,
}
# Each table ends with this, for names that are ours already.
_OWN: Table = [(r"head", "head"), (r"(.+)", r"backbone.\1"), (r"", "backbone")]

# The last part of a name in PyTorch: the possible names here, with their collections.
_LEAVES = {
    "weight": ("params/{}/kernel", "params/{}/scale"),
    "in_proj_weight": ("params/{}/kernel",),
    "bias": ("params/{}/bias",),
    "in_proj_bias": ("params/{}/bias",),
    "running_mean": ("batch_stats/{}/mean",),
    "running_var": ("batch_stats/{}/var",),
    "layer_scale": ("params/{}/gamma",),
    "class_token": ("params/{}/cls",),
    "cls_token": ("params/{}/cls",),
    "pos_embedding": ("params/{}/positions_embedding",),
    "pos_embed": ("params/{}/positions_embedding",),
}


def own_name(backbone: nn.Module, name: str, own: Collection[str]) -> str | None:
    """The name in `own`, such as "params/backbone/conv1/kernel", of the parameter that PyTorch calls `name`; or None.

    A backbone without a table here may have one in its attribute `torch_names`. Without any table, its modules must
    have the names that they have in PyTorch.
    """
    table = _TABLES.get(type(backbone), getattr(backbone, "torch_names", []))
    module, _, leaf = name.rpartition(".")
    for pattern, replacement in [*table, *_OWN]:
        if match := re.fullmatch(pattern, module):
            path = match.expand(replacement).replace(".", "/")
            places = _LEAVES.get(leaf, (f"params/{{}}/{leaf}",))
            return next((place.format(path) for place in places if place.format(path) in own), None)
    return None


def own_layout(array: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """PyTorch's array in the layout of our parameter `name`, which has the shape `shape`.

    Convolutions are [out, in, kh, kw] in PyTorch and [kh, kw, in, out] here, dense layers [out, in] and [in, out].
    Queries, keys and values are one dense layer in both. Axes of size one, such as in a layer scale's [d, 1, 1], are
    removed if ours has none. If the models differ, the result may have another shape than `shape`.
    """
    if name.endswith("/kernel"):
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    if array.ndim > len(shape) and array.squeeze().shape == shape:
        return array.squeeze()
    return array

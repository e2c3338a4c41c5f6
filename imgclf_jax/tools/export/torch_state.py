"""Weights by the names and in the layouts of a PyTorch model: the inverse of `weights.torch_names`."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.models import parts
from imgclf_jax.models.convnext import ConvNeXt
from imgclf_jax.models.resnet import ResNet, ResNetCIFAR, WideResNet
from imgclf_jax.models.vit import Mixer, ViT, sincos_positions
from imgclf_jax.weights import torch_names

Table = list[tuple[str, str | Callable[[re.Match[str]], str]]]  # (our module, as a regular expression, PyTorch's)

_RESNET: Table = [
    (r"head", "fc"),
    (r"backbone/(layer\d)_(\d+)/downsample_conv", r"\1.\2.downsample.0"),
    (r"backbone/(layer\d)_(\d+)/downsample_bn", r"\1.\2.downsample.1"),
    (r"backbone/(layer\d)_(\d+)/(\w+)", r"\1.\2.\3"),
]
_WIDE_RESNET: Table = [
    (r"head", "fc"),
    (r"backbone/layer(\d)_(\d+)/shortcut", r"block\1.layer.\2.convShortcut"),
    (r"backbone/layer(\d)_(\d+)/(\w+)", r"block\1.layer.\2.\3"),
]
_PARTS = {"dwconv": "0", "norm": "2", "pwconv1": "3", "pwconv2": "5"}  # of a ConvNeXt block, in torchvision
_CONVNEXT_TORCHVISION: Table = [
    (r"head", "classifier.2"),
    (r"backbone/norm", "classifier.0"),
    (r"backbone/stem_conv", "features.0.0"),
    (r"backbone/stem_norm", "features.0.1"),
    (r"backbone/downsample(\d)_norm", lambda m: f"features.{2 * int(m[1])}.0"),
    (r"backbone/downsample(\d)_conv", lambda m: f"features.{2 * int(m[1])}.1"),
    (r"backbone/stage(\d)_(\d+)/(\w+)", lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}.block.{_PARTS[m[3]]}"),
    (r"backbone/stage(\d)_(\d+)", lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}"),
]
_CONVNEXT_TIMM: Table = [
    (r"head", "head.fc"),
    (r"backbone/norm", "head.norm"),
    (r"backbone/stem_conv", "stem.0"),
    (r"backbone/stem_norm", "stem.1"),
    (r"backbone/downsample(\d)_norm", r"stages.\1.downsample.0"),
    (r"backbone/downsample(\d)_conv", r"stages.\1.downsample.1"),
    (r"backbone/stage(\d)_(\d+)/dwconv", r"stages.\1.blocks.\2.conv_dw"),
    (r"backbone/stage(\d)_(\d+)/norm", r"stages.\1.blocks.\2.norm"),
    (r"backbone/stage(\d)_(\d+)/pwconv(\d)", r"stages.\1.blocks.\2.mlp.fc\3"),
    (r"backbone/stage(\d)_(\d+)", r"stages.\1.blocks.\2"),
]
_VIT_TORCHVISION: Table = [
    (r"head", "heads.head"),
    (r"backbone", "encoder"),
    (r"backbone/patch", "conv_proj"),
    (r"backbone/norm", "encoder.ln"),
    (r"backbone/block(\d+)/norm(\d)", r"encoder.layers.encoder_layer_\1.ln_\2"),
    (r"backbone/block(\d+)/attn/qkv", r"encoder.layers.encoder_layer_\1.self_attention"),
    (r"backbone/block(\d+)/attn/proj", r"encoder.layers.encoder_layer_\1.self_attention.out_proj"),
    (r"backbone/block(\d+)/mlp/fc1", r"encoder.layers.encoder_layer_\1.mlp.0"),
    (r"backbone/block(\d+)/mlp/fc2", r"encoder.layers.encoder_layer_\1.mlp.3"),
]
_BLOCKS_TIMM: Table = [(r"backbone/block(\d+)/(.+)", lambda m: f"blocks.{m[1]}.{m[2].replace('/', '.')}")]
_VIT_TIMM: Table = [(r"backbone/patch", "patch_embed.proj"), *_BLOCKS_TIMM]
_MIXER_TIMM: Table = [(r"backbone/patch", "stem.proj"), *_BLOCKS_TIMM]

# The models whose names a backbone's weights may have: the first one unless told otherwise.
_TABLES: dict[type, dict[str, Table]] = {
    ResNet: {"torchvision": _RESNET, "timm": _RESNET},
    ResNetCIFAR: {"akamaster": [(r"head", "linear"), *_RESNET]},
    WideResNet: {"xternalz": _WIDE_RESNET},
    ConvNeXt: {"torchvision": _CONVNEXT_TORCHVISION, "timm": _CONVNEXT_TIMM},
    ViT: {"timm": _VIT_TIMM, "torchvision": _VIT_TORCHVISION},
    Mixer: {"timm": _MIXER_TIMM},
}
_OWN: Table = [(r"head", "head"), (r"backbone/(.+)", lambda m: m[1].replace("/", ".")), (r"backbone", "")]

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_LEAVES_TIMM = {**_LEAVES, "cls": "cls_token", "positions_embedding": "pos_embed"}
_LEAVES_TORCHVISION = {
    **_LEAVES, "cls": "class_token", "positions_embedding": "pos_embedding", "gamma": "layer_scale",
}  # fmt: skip


def naming(backbone: nn.Module, names: str = "") -> str:
    """Whose names a backbone's weights get: `names` itself, or its usual ones if that is empty.

    "own" are ours, joined by dots; a backbone whose block, norm or activation was swapped has no others. Raises
    UserError for names that the backbone's weights cannot have.
    """
    table = {} if parts.has_swapped(backbone) else _TABLES.get(type(backbone), {})
    known = [*table, "own"]
    if names and names not in known:
        raise UserError(unknown(f"names of a {type(backbone).__name__}", names, known))
    return names or known[0]


def state_dict(
    backbone: nn.Module, variables: Mapping[str, Any], names: str, image_shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """PyTorch's `state_dict` of a classifier over `backbone`, from its variables {"params", "batch_stats", …}.

    Modules that a method added to the backbone and the head, such as a projector, are left out.
    `names` are as `naming` gives them. Convolutions are [out, in, kh, kw] there and dense layers [out, in]. Fixed
    positions, which are no parameters here, are added where the model there has them. With "own" names dense layers
    after flattening expect [h, w, c], as here.
    """
    own = {name: x for name, x in tree.named_leaves(variables) if name.split("/")[1] in ("backbone", "head")}
    if isinstance(backbone, ViT) and backbone.positions == "sincos" and names != "own":
        own["params/backbone/positions_embedding"] = _fixed_positions(backbone, own, image_shape)
    table = [*_TABLES.get(type(backbone), {}).get(names, []), *_OWN]
    leaves = {"torchvision": _LEAVES_TORCHVISION, "timm": _LEAVES_TIMM}.get(names, _LEAVES)
    out: dict[str, np.ndarray] = {}
    for name, value in own.items():
        _, module, leaf = re.fullmatch(r"(\w+)/(.+)/(\w+)", name).groups()  # type: ignore[union-attr]
        theirs = "" if (names, leaf) == ("torchvision", "cls") else _module(module, table)  # it is no part of `encoder`
        label = ".".join(filter(None, (theirs, leaves.get(leaf, leaf))))
        if label.endswith("self_attention.weight") or label.endswith("self_attention.bias"):
            label = label.replace(".self_attention.", ".self_attention.in_proj_")
        out[label] = _layout(np.asarray(value), leaf, names)
        if leaf == "mean":  # a count that PyTorch keeps, and uses only without a momentum
            out[f"{theirs}.num_batches_tracked"] = np.zeros((), np.int64)
        if names != "own" and torch_names.own_name(backbone, label, own) != name:
            raise UserError(f"the weight {name} of {type(backbone).__name__} has no name in {names}'s model; "
                            "pass --names=own")  # fmt: skip
    return out


def _module(module: str, table: Table) -> str:
    for pattern, replacement in table:
        if match := re.fullmatch(pattern, module):
            return match.expand(replacement) if isinstance(replacement, str) else replacement(match)
    return module.replace("/", ".")


def _layout(array: np.ndarray, leaf: str, names: str) -> np.ndarray:
    if leaf == "kernel":
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    elif leaf == "gamma" and names == "torchvision":
        array = array[:, None, None]
    return np.ascontiguousarray(array)


def _fixed_positions(backbone: ViT, own: Mapping[str, Any], image_shape: tuple[int, int, int]) -> np.ndarray:
    """f32[1, tokens + n, d]: nothing is added to a class token."""
    h, w = (side // backbone.patch for side in image_shape[:2])
    positions = sincos_positions(h, w, own["params/backbone/patch/bias"].shape[0])
    return np.pad(positions, ((int(backbone.pool == "cls"), 0), (0, 0)))[None]

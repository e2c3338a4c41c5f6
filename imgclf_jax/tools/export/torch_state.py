"""A PyTorch `state_dict` from our variables, by the names and layouts in `weights.torch_names`."""

import numpy as np
from flax import linen as nn

from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError, check_choice
from imgclf_jax.core.typing import Variables
from imgclf_jax.models.vit import ViT, sincos_positions
from imgclf_jax.weights import torch_names


def naming(backbone: nn.Module, names: str = "") -> str:
    """The library whose names the weights get: `names`, or by default the first one that the backbone supports.

    "own" are our names of modules, joined by dots; a backbone with a swapped block, norm or activation supports no
    others. Raises UserError for names that the backbone does not support.
    """
    known = [*torch_names.tables(backbone), "own"]
    if names:
        check_choice(f"names of a {type(backbone).__name__}", names, known)
    return names or known[0]


def state_dict(
    backbone: nn.Module, variables: Variables, names: str, image_shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """PyTorch's `state_dict` of a classifier over `backbone`, from its variables {"params", "batch_stats", …}.

    `names` is a result of `naming`. Modules that a method adds to the backbone and the head, such as a projector, are
    dropped. Fixed positions, which are no parameters here, are added if the PyTorch model stores them. Raises
    UserError if the library's model lacks one of the weights, or needs another one.
    """
    own = {name: x for name, x in tree.named_leaves(variables) if name.split("/")[1] in ("backbone", "head")}
    if isinstance(backbone, ViT) and backbone.positions == "sincos" and names != "own":
        h, w = (side // backbone.patch for side in image_shape[:2])
        positions = sincos_positions(h, w, own["params/backbone/patch/bias"].shape[0])
        positions = np.pad(positions, ((backbone.prefix, 0), (0, 0)))  # zero for a class token
        own["params/backbone/positions_embedding"] = positions[None]
    labels, flattened = torch_names.torch_names(backbone, own, names), torch_names.flattened(backbone, image_shape, own)
    out: dict[str, np.ndarray] = {}
    for name, value in own.items():
        if (label := labels[name]) is None:
            raise UserError(f"the weight {name} of {type(backbone).__name__} has no name in {names}'s model; "
                            "pass --names=own")  # fmt: skip
        out[label] = torch_names.torch_layout(np.asarray(value), name, names, flattened.get(name, 1))
        if name == "params/head/kernel" and getattr(backbone, "applies_head", False) and names != "own":
            out[label] = out[label][..., None, None]  # a 1×1 convolution there
        if label.endswith(".running_mean"):  # a counter that PyTorch stores, and uses only without a momentum
            out[f"{label.removesuffix('running_mean')}num_batches_tracked"] = np.zeros((), np.int64)
    if isinstance(backbone, ViT) and names == "torchvision" and backbone.pool != "cls":
        raise UserError(f"torchvision's ViT needs a class token, which pool={backbone.pool!r} lacks; pass --names=timm")
    return out

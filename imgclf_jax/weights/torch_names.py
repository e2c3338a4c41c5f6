"""The parameter names and layouts of PyTorch models: one table per backbone and library, read in both directions.

A row pairs one of our modules with PyTorch's, as in `("backbone.layer{i}_{j}.{m}", "layer{i}.{j}.{m}")`. The letters i,
j and k stand for numbers, m for the rest of the name. A row also covers the parameters directly in that module. A table
has a row for every parameter of the library's model, and none for others. Export uses the first row that matches, so
later rows of the same module are aliases, which only import reads.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping

import jax
import numpy as np
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, Jaxpr

from imgclf_jax.core import jaxprs
from imgclf_jax.core.errors import UserError
from imgclf_jax.models import parts
from imgclf_jax.models.convnext import ConvNeXt
from imgclf_jax.models.efficientnet import EfficientNet, MobileNet
from imgclf_jax.models.norms import LayerNorm
from imgclf_jax.models.regnet import RegNetY
from imgclf_jax.models.resnet import ResNet, ResNetCIFAR, WideResNet
from imgclf_jax.models.squeezenet import SqueezeNet
from imgclf_jax.models.vit import EncoderBlock, Mixer, ViT

Rows = tuple[tuple[str, str], ...]
type Tables = dict[str, Rows | Callable[[Collection[str]], Rows]]  # by library

_RESNET: Rows = (
    ("head", "fc"),
    ("head", "linear"),
    ("backbone.conv1", "conv1"),
    ("backbone.bn1", "bn1"),
    ("backbone.layer{i}_{j}.downsample_conv", "layer{i}.{j}.downsample.0"),
    ("backbone.layer{i}_{j}.downsample_bn", "layer{i}.{j}.downsample.1"),
    ("backbone.layer{i}_{j}.downsample_pool_conv", "layer{i}.{j}.downsample.1"),
    ("backbone.layer{i}_{j}.downsample_pool_bn", "layer{i}.{j}.downsample.2"),
    ("backbone.layer{i}_{j}.{m}", "layer{i}.{j}.{m}"),
)
_RESNET_TIMM: Rows = (
    *((f"backbone.stem{i}_{layer}", f"conv1.{k}")  # of variant "D"
      for i, layer, k in ((1, "conv", 0), (1, "bn", 1), (2, "conv", 3), (2, "bn", 4), (3, "conv", 6))),
    *_RESNET,
)  # fmt: skip
_WIDE_RESNET: Rows = (
    ("head", "fc"),
    ("backbone.conv1", "conv1"),
    ("backbone.bn1", "bn1"),
    ("backbone.layer{i}_{j}.shortcut", "block{i}.layer.{j}.convShortcut"),
    ("backbone.layer{i}_{j}.{m}", "block{i}.layer.{j}.{m}"),
)
# torchvision numbers the stages and the downsampling layers between them in one list.
_CONVNEXT_TORCHVISION: Rows = (
    ("head", "classifier.2"),
    ("backbone.norm", "classifier.0"),
    ("backbone.stem_conv", "features.0.0"),
    ("backbone.stem_norm", "features.0.1"),
    *(
        (f"backbone.downsample{i}_{layer}", f"features.{2 * i}.{k}")
        for i in (1, 2, 3)
        for k, layer in enumerate(("norm", "conv"))
    ),
    *(
        (f"backbone.stage{i}_{{j}}.{layer}", f"features.{2 * i + 1}.{{j}}.block.{k}")
        for i in range(4)
        for k, layer in ((0, "dwconv"), (2, "norm"), (3, "pwconv1"), (5, "pwconv2"))
    ),
    *((f"backbone.stage{i}_{{j}}", f"features.{2 * i + 1}.{{j}}") for i in range(4)),
)
_CONVNEXT_TIMM: Rows = (
    ("head", "head.fc"),
    ("backbone.norm", "head.norm"),
    ("backbone.stem_conv", "stem.0"),
    ("backbone.stem_norm", "stem.1"),
    ("backbone.downsample{i}_norm", "stages.{i}.downsample.0"),
    ("backbone.downsample{i}_conv", "stages.{i}.downsample.1"),
    ("backbone.stage{i}_{j}.dwconv", "stages.{i}.blocks.{j}.conv_dw"),
    ("backbone.stage{i}_{j}.pwconv{k}", "stages.{i}.blocks.{j}.mlp.fc{k}"),
    ("backbone.stage{i}_{j}.grn", "stages.{i}.blocks.{j}.mlp.grn"),
    ("backbone.stage{i}_{j}.{m}", "stages.{i}.blocks.{j}.{m}"),
    # Aliases of the authors, facebookresearch/ConvNeXt.
    ("backbone.stem_conv", "downsample_layers.0.0"),
    ("backbone.stem_norm", "downsample_layers.0.1"),
    ("backbone.downsample{i}_norm", "downsample_layers.{i}.0"),
    ("backbone.downsample{i}_conv", "downsample_layers.{i}.1"),
    ("backbone.stage{i}_{j}.{m}", "stages.{i}.{j}.{m}"),
)
_EFFICIENTNET: Rows = (
    ("head", "classifier"),
    *((f"backbone.{layer}", layer) for layer in ("conv_stem", "bn1", "conv_head", "bn2")),
    ("backbone.stage{i}_{j}.se.{m}", "blocks.{i}.{j}.se.conv_{m}"),
    *((f"backbone.stage{{i}}_{{j}}.{layer}{ours}", f"blocks.{{i}}.{{j}}.{layer}.{theirs}")
      for layer in ("dw_start", "pw_exp", "dw_mid", "pw_proj") for ours, theirs in (("", "conv"), ("_bn", "bn"))),
    ("backbone.stage{i}_{j}.{m}", "blocks.{i}.{j}.{m}"),
)  # fmt: skip


def _lukemelas(names: Collection[str]) -> Rows:
    """lukemelas/EfficientNet-PyTorch numbers the blocks of all stages in one list."""
    rows = [("head", "_fc"), ("backbone.conv_stem", "_conv_stem"), ("backbone.bn1", "_bn0"),
            ("backbone.conv_head", "_conv_head"), ("backbone.bn2", "_bn1")]  # fmt: skip
    blocks = {tuple(map(int, found.groups())) for name in names if (found := re.search(r"/stage(\d+)_(\d+)/", name))}
    for n, (i, j) in enumerate(sorted(blocks)):
        block = f"backbone.stage{i}_{j}"
        expands = f"params/{block.replace('.', '/')}/conv_pwl/kernel" in names
        layers = {"conv_dw": "depthwise_conv", "se.reduce": "se_reduce", "se.expand": "se_expand",
                  "conv_pwl" if expands else "conv_pw": "project_conv"}  # fmt: skip
        layers |= {f"bn{k + expands}": f"bn{k}" for k in (0, 1, 2)} | ({"conv_pw": "expand_conv"} if expands else {})
        rows += [(f"{block}.{ours}", f"_blocks.{n}._{theirs}") for ours, theirs in layers.items()]
    return tuple(rows)


_REGNETY: Rows = (
    ("head", "head.fc"),
    ("backbone.stem_{m}", "stem.{m}"),
    *((f"backbone.stage{{i}}_{{j}}.{ours}", f"s{{i}}.b{{j}}.{theirs}") for ours, theirs in (
        ("conv{k}", "conv{k}.conv"), ("bn{k}", "conv{k}.bn"), ("se.reduce", "se.fc1"), ("se.expand", "se.fc2"),
        ("downsample_{m}", "downsample.{m}"))),
)  # fmt: skip
_SQUEEZENET: Rows = (
    ("head", "classifier.1"),
    ("backbone.conv1", "features.0"),
    *((f"backbone.fire{i}.{{m}}", f"features.{k}.{{m}}") for i, k in enumerate((3, 4, 6, 7, 9, 10, 11, 12), 2)),
)
_LAYER = "encoder.layers.encoder_layer_{i}"
_VIT_TORCHVISION: Rows = (
    ("head", "heads.head"),
    ("backbone.class_token", "class_token"),
    ("backbone.pos_embedding", "encoder.pos_embedding"),
    ("backbone.patch", "conv_proj"),
    ("backbone.norm", "encoder.ln"),
    ("backbone.block{i}.norm{k}", f"{_LAYER}.ln_{{k}}"),
    ("backbone.block{i}.attn.qkv.weight", f"{_LAYER}.self_attention.in_proj_weight"),
    ("backbone.block{i}.attn.qkv.bias", f"{_LAYER}.self_attention.in_proj_bias"),
    ("backbone.block{i}.attn.proj", f"{_LAYER}.self_attention.out_proj"),
    ("backbone.block{i}.mlp.fc1", f"{_LAYER}.mlp.0"),
    ("backbone.block{i}.mlp.fc2", f"{_LAYER}.mlp.3"),
    # Aliases of the published files, which name the layers of the MLP.
    ("backbone.block{i}.mlp.fc1", f"{_LAYER}.mlp.linear_1"),
    ("backbone.block{i}.mlp.fc2", f"{_LAYER}.mlp.linear_2"),
)
_BLOCKS_TIMM: Rows = (("head", "head"), ("backbone.norm", "norm"), ("backbone.block{i}.{m}", "blocks.{i}.{m}"))
_VIT_TIMM: Rows = (
    ("backbone.patch", "patch_embed.proj"),
    ("backbone.cls_token", "cls_token"),
    ("backbone.pos_embed", "pos_embed"),
    ("backbone.reg_token", "reg_token"),
    ("backbone.norm_pre", "norm_pre"),
    ("backbone.fc_norm", "fc_norm"),
    ("backbone.attn_pool", "attn_pool"),
    ("backbone.attn_pool.{m}", "attn_pool.{m}"),
    ("backbone.block{i}.ls{k}_gamma", "blocks.{i}.ls{k}.gamma"),
    *_BLOCKS_TIMM,
    ("backbone.block{i}.ls{k}_gamma", "blocks.{i}.gamma_{k}"),  # an alias of timm's Eva, which has the RoPEs
)

# The libraries whose names a backbone's weights can have; the first is the default of export. A function makes the rows
# for our names.
TABLES: dict[type, Tables] = {
    ResNet: {"torchvision": _RESNET, "timm": _RESNET_TIMM},
    ResNetCIFAR: {"akamaster": (("head", "linear"), *_RESNET)},
    WideResNet: {"xternalz": _WIDE_RESNET},
    ConvNeXt: {"torchvision": _CONVNEXT_TORCHVISION, "timm": _CONVNEXT_TIMM},
    EfficientNet: {"timm": _EFFICIENTNET, "lukemelas": _lukemelas},
    MobileNet: {"timm": (("backbone.bn2", "norm_head"), *_EFFICIENTNET)},
    RegNetY: {"timm": _REGNETY},
    SqueezeNet: {"torchvision": _SQUEEZENET},
    ViT: {"timm": _VIT_TIMM, "torchvision": _VIT_TORCHVISION},
    Mixer: {"timm": (("backbone.patch", "stem.proj"), *_BLOCKS_TIMM)},
}

# The last parts of names, ours to PyTorch's.
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_LIBRARY_LEAVES = {
    "timm": {"cls": "cls_token", "positions_embedding": "pos_embed", "registers": "reg_token"},
    "torchvision": {"cls": "class_token", "positions_embedding": "pos_embedding", "gamma": "layer_scale"},
    "facebookresearch": {"scale": "gamma", "bias": "beta"},  # of GRN
}
_PAIRS = [pair for leaves in (_LEAVES, *_LIBRARY_LEAVES.values()) for pair in leaves.items()]


def tables(backbone: nn.Module) -> Tables:
    """The backbone's tables, by library; none with a swapped block, norm or activation, which its model lacks.

    timm's ViT may have any epsilon and any GELU.
    """
    found, swapped = TABLES.get(type(backbone), {}), parts.has_swapped(backbone)
    if isinstance(backbone, ViT):
        norm, gelus = backbone.norm, [x for name, x in parts.ACTIVATIONS.items() if "gelu" in name]
        layer_norm = getattr(norm, "func", norm) is LayerNorm and {*getattr(norm, "keywords", ())} <= {"epsilon"}
        if backbone.rope or swapped:
            found = {"timm": (_VIT_TIMM[-1], *_VIT_TIMM) if backbone.rope else _VIT_TIMM}
        swapped = not (layer_norm and backbone.activation in gelus and backbone.block is EncoderBlock)
    return {} if swapped else found


def torch_names(backbone: nn.Module, names: Collection[str], library: str) -> dict[str, str | None]:
    """PyTorch's names of our parameters and statistics `names`, such as "params/backbone/conv1/kernel".

    `library` is a key of `tables`; a name is None if the library's model lacks the parameter.
    Any other `library`, such as "own", keeps the names of modules: see `_own_labels`.
    """
    if (table := tables(backbone).get(library)) is None:
        return {**_own_labels(names)}
    rows = table(names) if callable(table) else table
    leaves, out = {**_LEAVES, **_LIBRARY_LEAVES.get(library, {})}, dict[str, str | None]()
    for name in names:
        own = _dotted(name, leaves)
        out[name] = next((match.expand(new) for old, new in _patterns(rows) if (match := re.fullmatch(old, own))), None)
    return out


def own_name(backbone: nn.Module, name: str, own: Collection[str]) -> str | None:
    """Our name in `own`, such as "params/backbone/conv1/kernel", of the parameter that PyTorch calls `name`; or None.

    A backbone without a table may have an attribute `torch_names`: pairs of a regular expression for PyTorch's module
    and its replacement, our module, such as `(r"features\\.(\\d+)\\.conv", r"backbone.conv\\1")`. Modules that match
    none must have the same names as in PyTorch.
    """
    known = TABLES.get(type(backbone), {})
    rows = tuple((theirs, ours) for table in known.values()
                 for ours, theirs in (table(own) if callable(table) else table))  # fmt: skip
    given = () if known else tuple(_with_leaf(*pair) for pair in getattr(backbone, "torch_names", ()))
    for pattern, new in (*given, *_patterns(rows)):
        if match := re.fullmatch(pattern, name):
            module, _, leaf = match.expand(new).rpartition(".")
            for own_leaf in (*(ours for ours, theirs in _PAIRS if theirs == leaf), leaf):
                collection = "batch_stats" if own_leaf in ("mean", "var") else "params"
                if (found := f"{collection}/{module.replace('.', '/')}/{own_leaf}") in own:
                    return found
    return _own_names(frozenset(own)).get(name)


def _own_labels(names: Collection[str]) -> dict[str, str]:
    """{name: label} of the backbone's and the head's parameters and statistics, with names of modules as here.

    A label is the path below the backbone with PyTorch's last part, such as "conv1.weight" of the convolution `conv1`;
    where several would share it, with our last part; where they still would, as in two collections, the name itself.
    """
    labels: dict[str, str] = {}
    for label_of in (lambda name: _dotted(name, _LEAVES), lambda name: _dotted(name, {}), str):
        found = {name: re.sub(r"^backbone\.(?!head\b)", "", label_of(name)) for name in names if name not in labels}
        counts = Counter([*labels.values(), *found.values()])
        labels |= {name: label for name, label in found.items() if counts[label] == 1}
    return labels


@functools.lru_cache(maxsize=1)
def _own_names(names: frozenset[str]) -> dict[str, str]:
    """The inverse of `_own_labels` for a model that may have other modules too, such as a projector."""
    labels = _own_labels([name for name in names if name.split("/")[1] in ("backbone", "head")])
    return {label: name for name, label in labels.items()}


def _dotted(name: str, leaves: Mapping[str, str]) -> str:
    """The path below the collection, joined by dots, with its last part replaced by that in `leaves`."""
    module, _, leaf = name.partition("/")[2].rpartition("/")
    return f"{module}/{leaves.get(leaf, leaf)}".replace("/", ".")


@functools.cache
def _patterns(rows: Rows) -> list[tuple[str, str]]:
    """Compiles rows of templates (source, target) to regular expressions and replacements."""
    compiled = []
    for source, target in rows:
        pattern = source.replace(".", r"\.").replace("{m}", "(?P<m>.+)")
        pattern = re.sub(r"\{(\w)\}", r"(?P<\1>\\d+)", pattern)
        compiled.append(_with_leaf(pattern, re.sub(r"\{(\w)\}", r"\\g<\1>", target)))
    return compiled


def _with_leaf(pattern: str, replacement: str) -> tuple[str, str]:
    """Extends a rule for a module to the parameters directly in it."""
    return rf"(?:{pattern})(?P<leaf>\.\w+)?", rf"{replacement}\g<leaf>"


def flattened(
    backbone: nn.Module, image_shape: tuple[int, int, int], own: Mapping[str, jax.ShapeDtypeStruct | np.ndarray]
) -> dict[str, int]:
    """{kernel: c} of the dense layers among our parameters `own` whose input is a flattened image [h, w, c].

    PyTorch flattens it as [c, h, w], so the rows of the kernel are in another order there. Raises UserError if a
    flattened image might be the input of several layers.
    """
    if type(backbone) in TABLES:  # they flatten nothing
        return {}
    sizes = {*_flattened_sizes(jaxprs.forward(backbone, image_shape), set())}
    found = [(name, c) for size, c in sizes for name, x in own.items()
             if name.endswith("/kernel") and x.shape[:-1] == (size,)]  # fmt: skip
    if len({own[name].shape[0] for name, _ in found}) < len(found):
        names = ", ".join(name for name, _ in found)
        raise UserError(f"PyTorch orders the values of a flattened image differently, and one of {names} reads them; "
                        "give each a different number of inputs")  # fmt: skip
    return dict(found)


def _flattened_sizes(jaxpr: Jaxpr | ClosedJaxpr, channels_first: set[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """Yields (h * w * c, c) for each [b, h, w, c] that is flattened to [b, h * w * c]."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for one in jaxprs.inner(equation):
            yield from _flattened_sizes(one, channels_first)
        name, shapes = equation.primitive.name, [one.aval.shape for one in (*equation.invars, *equation.outvars)]
        if name == "transpose" and equation.params["permutation"] == (0, 3, 1, 2):
            channels_first.add(shapes[-1])  # flattened as in PyTorch
        elif name == "reshape" and len(shapes[0]) == 4 and shapes[0] not in channels_first:
            b, h, w, c = shapes[0]
            if shapes[-1] == (b, h * w * c) and h * w > 1 and c > 1:
                yield h * w * c, c


def own_layout(array: np.ndarray, name: str, shape: tuple[int, ...], channels: int = 1) -> np.ndarray:
    """PyTorch's array in the layout of our parameter `name`, which has the shape `shape`.

    Convolutions are [out, in, kh, kw] in PyTorch and [kh, kw, in, out] here, dense layers [out, in] and [in, out];
    behind a flattened image of `channels`, `in` is [c, h, w] there and [h, w, c] here. Axes of size one, as in a layer
    scale [d, 1, 1] or a 1×1 convolution, are removed or added. If the models differ, the shape may not be `shape`.
    """
    if channels > 1 and array.shape[::-1] == shape:
        array = array.reshape(len(array), channels, -1).swapaxes(1, 2).reshape(array.shape)
    if name.endswith("/kernel"):
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    as_own = array.ndim != len(shape) and [n for n in array.shape if n > 1] == [n for n in shape if n > 1]
    return array.reshape(shape) if as_own else array


def torch_layout(array: np.ndarray, name: str, library: str, channels: int = 1) -> np.ndarray:
    """Our parameter `name` in the layout of PyTorch: the inverse of `own_layout`."""
    if channels > 1:
        array = array.reshape(-1, channels, array.shape[1]).swapaxes(0, 1).reshape(array.shape)
    if name.endswith("/kernel"):
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    elif name.endswith("/gamma") and library == "torchvision":
        array = array[:, None, None]
    return np.ascontiguousarray(array)

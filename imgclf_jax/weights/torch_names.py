"""The parameter names and layouts of other libraries: one table per backbone and library, read in both directions.

A row pairs one of our modules with PyTorch's, as in `("backbone.layer{i}_{j}.{m}", "layer{i}.{j}.{m}")`. The letters i,
j and k stand for numbers, m for the rest of the name. A row also covers the parameters directly in that module. A table
has a row for every parameter of the library's model, and none for others. Export uses the first row that matches, so
later rows of the same module are aliases, which only import reads. Vision transformers of further origins, such as
transformers, the authors' repositories and big_vision, first get timm's names by rules.
"""

import functools
import math
import re
from collections import Counter, defaultdict
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
    *((f"backbone.downsample{i}_{layer}", f"features.{2 * i}.{k}")
      for i in (1, 2, 3) for k, layer in enumerate(("norm", "conv"))),
    *((f"backbone.stage{i}_{{j}}.{ours}", f"features.{2 * i + 1}.{{j}}.{theirs}") for i in range(4)
      for ours, theirs in (("dwconv", "block.0"), ("norm", "block.2"), ("pwconv1", "block.3"), ("pwconv2", "block.5"),
                           ("gamma", "layer_scale"))),
)  # fmt: skip
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
    ("backbone.stage{i}_{j}.grn.weight", "stages.{i}.{j}.grn.gamma"),
    ("backbone.stage{i}_{j}.grn.bias", "stages.{i}.{j}.grn.beta"),
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
    both = (("conv_dw", "depthwise_conv"), ("se.reduce", "se_reduce"), ("se.expand", "se_expand"))
    first = (*both, ("conv_pw", "project_conv"), ("bn1", "bn1"), ("bn2", "bn2"))  # of blocks without expansion
    later = (*both, ("conv_pw", "expand_conv"), ("conv_pwl", "project_conv"),
             *((f"bn{k + 1}", f"bn{k}") for k in range(3)))  # fmt: skip
    blocks = {tuple(map(int, found.groups())) for name in names if (found := re.search(r"/stage(\d+)_(\d+)/", name))}
    for n, (i, j) in enumerate(sorted(blocks)):
        layers = later if f"params/backbone/stage{i}_{j}/conv_pwl/kernel" in names else first
        rows += [(f"backbone.stage{i}_{j}.{ours}", f"_blocks.{n}._{theirs}") for ours, theirs in layers]
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
    ("backbone.cls", "class_token"),
    ("backbone.positions_embedding", "encoder.pos_embedding"),
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
    ("backbone.cls", "cls_token"),
    ("backbone.positions_embedding", "pos_embed"),
    ("backbone.registers", "reg_token"),
    ("backbone.norm_pre", "norm_pre"),
    ("backbone.fc_norm", "fc_norm"),
    ("backbone.attn_pool", "attn_pool"),
    ("backbone.attn_pool.{m}", "attn_pool.{m}"),
    ("backbone.block{i}.ls{k}_gamma", "blocks.{i}.ls{k}.gamma"),
    *_BLOCKS_TIMM,
    ("backbone.block{i}.ls{k}_gamma", "blocks.{i}.gamma_{k}"),  # an alias of timm's Eva, which has the RoPEs
)

_PREFIXES = ("visual.trunk.", "visual.", "vision_model.", "params/img/", "params/", "opt/target/", "vit.", "deit.",
             "dinov2.", "dinov2_with_registers.")  # fmt: skip
# What is no part of a vision network: text towers, projections into a joint space, masks and fixed tables.
_IGNORED = re.compile(r"(.*\.)?(mask_token|position_ids|bias_mask|periods)|(text_|logit_|pooler|local_cls_norm).*|proj|"
                      r"(visual_)?projection\.weight")  # fmt: skip
# The rules of `as_timm`. `A#1` is part 1 of timm's array A along its first axis, `A|B` says that an array holds A and B
# in equal parts, and `*` stands for the number of the block along the first axis.
_ATTENTION = r"\.(?:MultiHeadDotProductAttention_\d|attention|self_attn|attn)\.(?:attention\.)?"
_RULES = [(re.compile(old), new) for new, old in (  # applied in turn
    ("blocks.", r"^(encoder\.|model\.)?layers?\.(?=\d)|^transformer\.resblocks\.|^Transformer\.encoderblock_"),
    ("blocks.*.", r"^Transformer\.encoderblock\."),
    ("", r"^embeddings\.|^Transformer\.(posembed_input\.)?(?=pos|encoder_norm)"),
    ("patch_embed.proj.", r"^(patch_embeddings\.projection|patch_embeddings?|patch_embedding|conv1|embedding)\."),
    ("pos_embed", r"^pos(ition|itional)?_embeddings?(\.weight)?$"),
    ("cls_token", r"^(class_embedding|cls)$"),
    ("reg_token", r"^(register|storage)_tokens$"),
    ("norm_pre.", r"^(pre_layrnorm|ln_pre)\."),
    ("norm.", r"^(post_layernorm|layernorm|ln_post|encoder_norm)\."),
    ("attn_pool.", r"^MAPHead_0\.|^head\.(?=probe|attention|layernorm|mlp)"),
    ("attn_pool.norm.", r"^attn_pool\.(layernorm|LayerNorm_0)\."),
    ("attn_pool.latent", r"^attn_pool\.probe"),
    (r"\1.norm1.", r"^(blocks\.[\d*]+)\.(layer_norm1|layernorm_before|ln_1|LayerNorm_0)\."),
    (r"\1.norm2.", r"^(blocks\.[\d*]+)\.(layer_norm2|layernorm_after|ln_2|LayerNorm_[12])\."),
    (".attn.proj.", rf"{_ATTENTION}(output\.dense|o_proj|out_proj|out)\."),
    (".attn.qkv.", rf"{_ATTENTION}in_proj_"),
    *((f".attn.qkv#{i}.", rf"{_ATTENTION}{name}\.|\.(attention|self_attn)\.{name[0]}_proj\.")
      for i, name in enumerate(("query", "key", "value"))),
    (r"attn_pool.q.\1|attn_pool.kv#1.\1|attn_pool.kv#2.\1", r"^attn_pool\.attn\.qkv\.(\w+)"),
    ("attn_pool.q", r"^attn_pool\.attn\.qkv#0"),
    ("attn_pool.kv", r"^attn_pool\.attn\.qkv"),
    ("attn_pool.", r"^attn_pool\.attn\."),
    (r"ls\1.gamma", r"layer_scale([12])\.lambda1"),
    ("mlp.fc1", r"(?<=\d\.)intermediate\.dense|MlpBlock_\d\.Dense_0|mlp\.(c_fc|w12)(?=\.)"),
    ("mlp.fc2", r"(?<=\d\.)output\.dense|MlpBlock_\d\.Dense_1|mlp\.(c_proj|down_proj|w3)(?=\.)"),
    ("mlp.fc1_g", r"mlp\.(gate_proj|w1)(?=\.)"),
    ("mlp.fc1_x", r"mlp\.w2(?=\.)"),
    ("mlp.norm", r"mlp\.ffn_ln"),
    ("head.", r"^classifier\."),
    (".weight", r"\.(kernel|scale)$"),
)]  # fmt: skip

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


def tables(backbone: nn.Module) -> Tables:
    """The backbone's tables, by library; none with a swapped block, norm or activation, which its model lacks.

    timm's ViT may have any epsilon and any GELU. Only timm has ResNet-D, ConvNeXt V2 and EfficientNetV2.
    """
    found, swapped = TABLES.get(type(backbone), {}), parts.has_swapped(backbone)
    if str(getattr(backbone, "variant", "")).startswith(("D", "V2")):
        found = {library: rows for library, rows in found.items() if library == "timm"}
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
        return {**_own_labels(frozenset(names))}
    rows = table(names) if callable(table) else table
    out = dict[str, str | None]()
    for name in names:
        own = _dotted(name, _LEAVES)
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
            for own_leaf in (*(ours for ours, theirs in _LEAVES.items() if theirs == leaf), leaf):
                collection = "batch_stats" if own_leaf in ("mean", "var") else "params"
                if (found := f"{collection}/{module.replace('.', '/')}/{own_leaf}") in own:
                    return found
    return next((ours for ours, label in _own_labels(frozenset(own)).items() if label == name), None)


@functools.lru_cache(maxsize=1)
def _own_labels(names: frozenset[str]) -> dict[str, str]:
    """{name: label} of the backbone's and the head's parameters and statistics, with names of modules as here.

    A label is the path below the backbone with PyTorch's last part, such as "conv1.weight" of the convolution `conv1`;
    where several would share it, with our last part; where they still would, as in two collections, the name itself.
    """
    kept, labels = sorted(name for name in names if name.split("/")[1] in ("backbone", "head")), dict[str, str]()
    for label_of in (lambda name: _dotted(name, _LEAVES), lambda name: _dotted(name, {}), str):
        found = {name: re.sub(r"^backbone\.(?!head\b)", "", label_of(name)) for name in kept if name not in labels}
        counts = Counter([*labels.values(), *found.values()])
        labels |= {name: label for name, label in found.items() if counts[label] == 1}
    return labels


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


def as_timm(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a vision transformer by timm's names, in PyTorch's layout.

    Those with timm's names stay; those that no vision network has are left out. Raises ValueError, TypeError or
    IndexError if arrays that timm holds in one do not fit together.
    """
    flax, text = any(label.endswith("embedding/kernel") for label in arrays), "\n".join(arrays)
    prefixes = [one for one in _PREFIXES if flax or "/" not in one]
    prefix = next((one for one in prefixes if any(label.startswith(one) for label in arrays)), "")
    rules = [*_RULES, (re.compile(r"mlp\.up_proj"), "mlp.fc1_x" if "gate_proj" in text else "mlp.fc1")]
    if "storage_tokens" in arrays:  # DINOv3's keys have no bias: a mask removes it
        rules.append((re.compile(r"(.*attn\.)qkv\.bias"), r"\1q_bias||\1v_bias"))
    if not re.search(r"[./](k_proj|key)[./]bias", text):
        rules += [(re.compile(rf"attn\.qkv#{i}\.bias"), f"attn.{part}_bias") for i, part in enumerate("qkv")]
    pieces = defaultdict[str, dict[str, np.ndarray]](dict)
    for label, array in arrays.items():
        name = label.removeprefix(prefix)
        if not label.startswith((prefix, "classifier.")) or _IGNORED.fullmatch(name):
            continue
        name = name.replace("/", ".") if flax else name
        for old, new in rules:
            name = old.sub(new, name)
        targets = name.split("|")
        for target, part in zip(targets, np.split(array, len(targets)) if targets[1:] else [array], strict=True):
            for i, one in enumerate(part if "*" in target else [part]):
                name = re.sub(r"#\d", "", target).replace("*", str(i))
                pieces[name][target] = _torch_layout(one, name) if flax else one
    pieces.pop("", None)
    out = {name: np.concatenate([x for _, x in sorted(found.items())]) if found.keys() != {name} else found[name]
           for name, found in pieces.items()}  # fmt: skip
    for name in out.keys() & {"cls_token", "pos_embed"}:
        out[name] = out[name].reshape(1, -1, out[name].shape[-1])
    positions = out.get("pos_embed", np.zeros((1, 1)))
    if {"reg_token", "cls_token", "pos_embed"} <= out.keys() and math.isqrt(n := positions.shape[1] - 1) ** 2 == n:
        out["cls_token"] = out["cls_token"] + positions[:, :1]  # DINOv2 with registers adds it in each pass
        out["pos_embed"] = positions[:, 1:]
    return out


def _torch_layout(x: np.ndarray, name: str) -> np.ndarray:
    """An array of flax in the layout of PyTorch; attention's kernels have an axis of heads, [d, heads, d / heads]."""
    if x.ndim == 1 or name in ("cls_token", "pos_embed", "attn_pool.latent"):
        return x
    if x.ndim == 4:
        return x.transpose(3, 2, 0, 1)
    last = name.endswith("proj.weight")  # [heads, d / heads, d]
    return (x.reshape(-1, x.shape[-1]) if last else x.reshape(len(x), -1)).T if ".weight" in name else x.reshape(-1)

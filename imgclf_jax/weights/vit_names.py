"""timm's names for vision transformers of other origins: transformers, the authors' repositories, big_vision's arrays.

In a converted name, `A#1` is part 1 of timm's array A along its first axis, `A|B` says that an array holds A and B in
equal parts, and `^A` is in flax's layout, where `*` in A stands for the blocks along the first axis.
"""

import collections
import math
import re
from collections.abc import Collection, Mapping

import numpy as np

_PREFIXES = ("visual.trunk.", "visual.", "vision_model.", "params/img/", "params/", "opt/target/", "vit.", "deit.",
             "dinov2.", "dinov2_with_registers.")  # fmt: skip
# What is no part of a vision network: text towers, projections into a joint space, masks and fixed tables.
_IGNORED = re.compile(r"(.*\.)?(mask_token|position_ids|bias_mask|periods)|(text_|logit_|pooler|local_cls_norm).*|proj|"
                      r"(visual_)?projection\.weight")  # fmt: skip
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


def converted(labels: Collection[str]) -> dict[str, str]:
    """{label: converted name} of a file's names; those of timm stay, those that no vision network has are left out."""
    flax, text = any(label.endswith("embedding/kernel") for label in labels), "\n".join(labels)
    prefixes = [one for one in _PREFIXES if flax or "/" not in one]
    prefix = next((one for one in prefixes if any(label.startswith(one) for label in labels)), "")
    rules = [*_RULES, (re.compile(r"mlp\.up_proj"), "mlp.fc1_x" if "gate_proj" in text else "mlp.fc1")]
    if "storage_tokens" in labels:  # DINOv3's keys have no bias: a mask removes it
        rules.append((re.compile(r"(.*attn\.)qkv\.bias"), r"\1q_bias||\1v_bias"))
    if not re.search(r"[./](k_proj|key)[./]bias", text):
        rules += [(re.compile(rf"attn\.qkv#{i}\.bias"), f"attn.{part}_bias") for i, part in enumerate("qkv")]
    out = {}
    for label in labels:
        name = label.removeprefix(prefix)
        if label.startswith((prefix, "classifier.")) and not _IGNORED.fullmatch(name):
            name = name.replace("/", ".") if flax else name
            for old, new in rules:
                name = old.sub(new, name)
            out[label] = "^" * flax + name
    return out


def names(converted_name: str) -> list[str]:
    """timm's names in a converted name; of stacked blocks those of the first."""
    return [part for part in re.sub(r"#\d|^\^", "", converted_name).replace("*", "0").split("|") if part]


def joined(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{timm's name: array in PyTorch's layout} of {converted name: array}."""
    parts = collections.defaultdict[str, dict[str, np.ndarray]](dict)
    for label, array in arrays.items():
        targets = label.removeprefix("^").split("|")
        for target, part in zip(targets, np.split(array, len(targets)) if targets[1:] else [array], strict=True):
            for i, one in enumerate(part if "*" in target else [part]):
                name = re.sub(r"#\d", "", target).replace("*", str(i))
                parts[name][target] = _torch_layout(one, name) if label[0] == "^" else one
    parts.pop("", None)
    out = {name: np.concatenate([x for _, x in sorted(found.items())]) if found.keys() != {name} else found[name]
           for name, found in parts.items()}  # fmt: skip
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

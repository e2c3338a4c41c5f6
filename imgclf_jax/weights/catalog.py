"""Published networks by timm's names: the backbone, the preprocessing and the licence of their weights."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

type Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]  # (mean, std) of pixels in 0–1

IMAGENET: Normalization = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF: Normalization = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
CLIP: Normalization = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LITE: Normalization = (127 / 255,) * 3, (128 / 255,) * 3

_NC = "CC BY-NC 4.0"
_SCALES = ((224, 0.875), (240, 0.882), (260, 0.89), (300, 0.904), (380, 0.922))  # (size, crop) of B0 to B4


@dataclass(frozen=True)
class Published:
    """A network with published weights, as timm's `pretrained_cfg` describes it."""

    model: str  # the backbone's spec
    size: int = 224  # the side of its images, in pixels
    crop: float = 0.875  # the side of the central crop as a fraction of the resized image's shorter side
    normalization: Normalization = IMAGENET
    license: str = ""  # the name of a licence that forbids some uses; "" for one that does not
    interpolation: str = "bicubic"


_DINOV2 = "patch=14, layer_scale=1e-5"
_DINOV3 = ("positions='none', rope='dinov3', class_token=True, registers=4, pool='mean', layer_scale=1e-5, "
           "norm='layer_norm(epsilon=1e-5)'")  # fmt: skip
_SIGLIP = "pool='map', activation='gelu_tanh'"  # as big_vision trained it; timm's networks have the exact GELU
_OPENCLIP = "patch={1}, pre_norm=True, norm='layer_norm(epsilon=1e-5)'"
_OPENAI = f"{_OPENCLIP}, activation='quick_gelu'"  # which timm's names without quickgelu lack
_DEIT3 = "positions='patches', layer_scale=1e-6"
_SBB = "positions='patches', pool='mean', fc_norm=True, layer_scale=1e-5"
_ROPE = "positions='none', rope='eva02', pool='mean', fc_norm=True, layer_scale=1e-5"
_EVA02 = "patch=14, rope='eva02', class_token=True, pool='mean', fc_norm=True, mlp_ratio=2.6667, qkv_bias='qv'"
_EVA02_S, _EVA02_B = f"{_EVA02}, mlp='swiglu_packed'", f"{_EVA02}, mlp='swiglu', mlp_norm=True, qkv_fused=False"
# Rows of names with choices in brackets; the spec, where `{i}` is choice i, and in _VITS without the variant, which is
# the first choice; then as in Published.
type _Rows = tuple[tuple[Any, ...], ...]
_VITS: _Rows = (
    ("vit_[small base large]_patch14_dinov2.lvd142m", _DINOV2, 518, 1.0),
    ("vit_[small base large]_patch14_reg4_dinov2.lvd142m", f"{_DINOV2}, registers=4, positions='patches'", 518, 1.0),
    *((f"vit_[{words}]_patch16_dinov3{suffix}.lvd1689m", f"{_DINOV3}, qkv_bias={bias!r}{mlp}", 256, 1.0, IMAGENET,
       "DINOv3") for suffix, bias in (("", ""), ("_qkvb", "qv"))  # the authors' files have biases
      for words, mlp in (("small base large", ""), ("small_plus", ", mlp='swiglu'"))),
    ("vit_[large]_patch16_dinov3.sat493m", f"{_DINOV3}, qkv_bias=''", 256, 1.0,
     ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)), "DINOv3"),
    ("vit_[base]_patch16_siglip_224.v2_webli", _SIGLIP, 224, 0.9, HALF),
    *((f"vit_[base large]_patch16_siglip_{n}.v2_webli", _SIGLIP, n, 0.9, HALF) for n in (256, 384, 512)),
    ("vit_[base]_patch[32 16]_clip_quickgelu_224.openai", _OPENAI, 224, 0.9, CLIP),
    ("vit_[large]_patch[14]_clip_quickgelu_224.openai", _OPENAI, 224, 1.0, CLIP),
    *((f"vit_[{word}]_patch[{patch}]_clip_{tag}", model, 224, 1.0, CLIP, license)
      for word, patch in (("base", "32 16"), ("large", "14")) for tag, model, license in (
          ("quickgelu_224.metaclip_400m", _OPENAI, "CC-BY-NC-4.0"), ("224.datacompxl", _OPENCLIP, ""))),
    ("vit_[base]_patch[32]_clip_224.laion2b", _OPENCLIP, 224, 0.9, CLIP),
    ("vit_[base]_patch[16]_clip_224.laion2b", _OPENCLIP, 224, 1.0, CLIP),
    ("vit_[large]_patch[14]_clip_224.laion2b", _OPENCLIP, 224, 1.0, HALF),
    ("deit3_[small medium base large]_patch16_224.fb_in1k", _DEIT3, 224, 0.9),
    ("deit3_[small medium base large]_patch16_224.fb_in22k_ft_in1k", _DEIT3, 224, 1.0),
    ("deit3_[small base large]_patch16_384.[fb_in1k fb_in22k_ft_in1k]", _DEIT3, 384, 1.0),
    ("vit_[tiny small base large]_patch16_224.[augreg_in21k augreg_in21k_ft_in1k]", "patch=16", 224, 0.9, HALF),
    ("vit_[tiny small base large]_patch16_384.augreg_in21k_ft_in1k", "patch=16", 384, 1.0, HALF),
    ("vit_[small base]_patch[32]_224.[augreg_in21k augreg_in21k_ft_in1k]", "patch={1}", 224, 0.9, HALF),
    ("vit_[small base]_patch16_224.augreg_in1k", "patch=16", 224, 0.9, HALF),
    ("vit_[wee]_patch16_reg1_gap_256.sbb_in1k", f"{_SBB}, registers=1, mlp_ratio=5.0", 256, 0.95, HALF),
    ("vit_[little]_patch16_reg4_gap_256.sbb_in1k", f"{_SBB}, registers=4, mlp_ratio=5.6", 256, 0.95, HALF),
    ("vit_[medium betwixt]_patch16_reg[1 4]_gap_256.sbb_in1k", f"{_SBB}, registers={{1}}", 256, 0.95, HALF),
    ("vit_[medium mediumd betwixt]_patch16_reg4_gap_256.sbb_in12k_ft_in1k", f"{_SBB}, registers=4", 256, 0.95, HALF),
    ("vit_[medium base]_patch16_rope_reg1_gap_256.sbb_in1k", f"{_ROPE}, registers=1, qkv_bias='qv'", 256, 0.95, HALF),
    ("vit_[mediumd]_patch16_rope_reg1_gap_256.sbb_in1k", f"{_ROPE}, registers=1, qkv_bias=''", 256, 0.95, HALF),
    ("vit_[betwixt]_patch16_rope_reg4_gap_256.sbb_in1k", f"{_ROPE}, registers=4, qkv_bias='qv'", 256, 0.95, CLIP),
    ("eva02_[tiny small]_patch14_224.mim_in22k", _EVA02_S, 224, 0.9, CLIP),
    ("eva02_[tiny small]_patch14_336.mim_in22k_ft_in1k", _EVA02_S, 336, 1.0, CLIP),
    ("eva02_[base large]_patch14_224.mim_in22k", _EVA02_B, 224, 0.9, CLIP),
    ("eva02_[base large]_patch14_448.mim_in22k_ft_in1k", _EVA02_B, 448, 1.0, CLIP),
)  # fmt: skip
_VARIANTS = {"tiny": "Ti", "small": "S", "small_plus": "S", "base": "B", "large": "L"}
_CONVOLUTIONAL: _Rows = (
    ("resnet[18 34 50 101 152].tv_in1k", "resnet({0})", 224, 0.875, IMAGENET, "", "bilinear"),
    ("resnet[18 34 50]d.ra2_in1k", "resnet({0}, variant='D')"),
    ("resnet[101 152]d.ra2_in1k", "resnet({0}, variant='D')", 256, 0.95),
    *((f"tf_efficientnet_b[{i}].[{tags}]", "efficientnet('B{0}')", *_SCALES[i], normalization) for i in range(5)
      for tags, normalization in (("in1k aa_in1k ns_jft_in1k", IMAGENET), ("ap_in1k", HALF))),
    *((f"efficientnet_b[{i}].{tag}", "efficientnet('B{0}', like='timm')", size)
      for i, tag, size in ((0, "ra_in1k", 224), (1, "ft_in1k", 224), (2, "ra_in1k", 256), (3, "ra2_in1k", 288),
                           (4, "ra2_in1k", 320))),
    ("tf_efficientnetv2_s.[in1k in21k in21k_ft_in1k]", "efficientnet('V2-S')", 300, 1.0, HALF),
    # timm's names for the files of the authors, and lukemelas's, which packages hold.
    *((name, f"efficientnet('Lite{i}')", *_SCALES[i], normalization) for i in range(3) for name, normalization in (
        (f"tf_efficientnet_lite{i}.in1k", HALF), (f"efficientnet_lite{i}", LITE))),
    ("efficientnet_lite0.ra_in1k", "efficientnet('Lite0', like='timm')"),
    ("tf_mobilenetv3_large_100.in1k", "mobilenet('V3-L', like='tf')", 224, 0.875, HALF, "", "bilinear"),
    ("mobilenetv3_large_100.ra_in1k", "mobilenet('V3-L')"),
    ("mobilenetv3_large_100.ra4_e3600_r224_in1k", "mobilenet('V3-L')", 224, 0.95, HALF),
    ("mobilenetv4_conv_small.[e1200_r224_in1k e2400_r224_in1k]", "mobilenet('V4-S')"),
    ("mobilenetv4_conv_small.e3600_r256_in1k", "mobilenet('V4-S')", 256, 0.95, HALF),
    *((f"mobilenetv4_conv_medium.e500_r{size}_in1k", "mobilenet('V4-M')", size, 0.95) for size in (224, 256)),
    *((f"convnextv2_{size}.[{tags}]", f"convnext('V2-{variant}')", 224, 0.875, IMAGENET, _NC)
      for size, variant, tags in (
          ("atto", "Atto", "fcmae_ft_in1k"), ("femto", "Femto", "fcmae_ft_in1k"), ("pico", "Pico", "fcmae_ft_in1k"),
          *((size, variant, "fcmae_ft_in1k fcmae_ft_in22k_in1k") for size, variant in (
              ("nano", "Nano"), ("tiny", "T"), ("base", "B"), ("large", "L"))))),
    *((f"regnety_{n:03}.{tag}", f"regnety('{f'{n}00MF' if n < 10 else f'{n / 10:g}GF'}')", 224, crop)
      for tag, crop, numbers in (
          ("pycls_in1k", 0.875, (2, 4, 6, 8, 16, 32, 40, 64, 80, 120, 160, 320)), ("ra_in1k", 0.95, (32,)),
          ("ra3_in1k", 0.95, (40, 64, 80)), ("tv2_in1k", 0.965, (4, 16, 32, 160, 320)))
      for n in numbers),
    ("squeezenet1_1", "squeezenet", 224, 0.875, IMAGENET, "", "bilinear"),  # torchvision's
)  # fmt: skip


def _published(rows: _Rows) -> Iterator[tuple[str, Published]]:
    """(name, network) for each combination of the choices in the names of a row."""
    for names, model, *facts in rows:
        for words in itertools.product(*(choice.split() for choice in re.findall(r"\[(.*?)\]", names))):
            variant = f"vit({_VARIANTS.get(words[0], words[0])!r}, {model})" if rows is _VITS else model
            yield re.sub(r"\[.*?\]", "{}", names).format(*words), Published(variant.format(*words), *facts)


NETWORKS: dict[str, Published] = dict([*_published(_VITS), *_published(_CONVOLUTIONAL)])

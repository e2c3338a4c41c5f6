"""Published networks by timm's names: the backbone, the preprocessing and the licence of their weights."""

import difflib
from dataclasses import dataclass

from imgclf_jax.core.errors import UserError

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
    interpolation: str = "bicubic"
    normalization: Normalization = IMAGENET
    license: str = ""  # the name of a licence that forbids some uses; "" for one that does not


NETWORKS: dict[str, Published] = {
    **{f"resnet{depth}.tv_in1k": Published(f"resnet({depth})", interpolation="bilinear")
       for depth in (18, 34, 50, 101, 152)},
    **{f"resnet{depth}d.ra2_in1k": Published(f"resnet({depth}, variant='D')", *((256, 0.95) if depth > 50 else ()))
       for depth in (18, 34, 50, 101, 152)},
    **{f"tf_efficientnet_b{i}.{tag}": Published(f"efficientnet('B{i}')", *scale, "bicubic", normalization)
       for i, scale in enumerate(_SCALES)
       for tag, normalization in (("in1k", IMAGENET), ("aa_in1k", IMAGENET), ("ap_in1k", HALF),
                                  ("ns_jft_in1k", IMAGENET))},
    **{f"efficientnet_b{i}.{tag}": Published(f"efficientnet('B{i}', like='timm')", size)
       for i, tag, size in ((0, "ra_in1k", 224), (1, "ft_in1k", 224), (2, "ra_in1k", 256), (3, "ra2_in1k", 288),
                            (4, "ra2_in1k", 320))},
    **{f"tf_efficientnetv2_s.{tag}": Published("efficientnet('V2-S')", 300, 1.0, "bicubic", HALF)
       for tag in ("in1k", "in21k", "in21k_ft_in1k")},
    **{f"tf_efficientnet_lite{i}.in1k": Published(f"efficientnet('Lite{i}')", size, crop, "bicubic", HALF)
       for i, (size, crop) in enumerate(_SCALES[:3])},
    "efficientnet_lite0.ra_in1k": Published("efficientnet('Lite0', like='timm')"),
    "tf_mobilenetv3_large_100.in1k": Published("mobilenet('V3-L', like='tf')", 224, 0.875, "bilinear", HALF),
    "mobilenetv3_large_100.ra_in1k": Published("mobilenet('V3-L')"),
    "mobilenetv3_large_100.ra4_e3600_r224_in1k": Published("mobilenet('V3-L')", 224, 0.95, "bicubic", HALF),
    "mobilenetv4_conv_small.e1200_r224_in1k": Published("mobilenet('V4-S')"),
    "mobilenetv4_conv_small.e2400_r224_in1k": Published("mobilenet('V4-S')"),
    "mobilenetv4_conv_small.e3600_r256_in1k": Published("mobilenet('V4-S')", 256, 0.95, "bicubic", HALF),
    "mobilenetv4_conv_medium.e500_r224_in1k": Published("mobilenet('V4-M')", 224, 0.95),
    "mobilenetv4_conv_medium.e500_r256_in1k": Published("mobilenet('V4-M')", 256, 0.95),
    **{f"convnextv2_{size}.{tag}": Published(f"convnext('V2-{variant}')", license=_NC)
       for size, variant in (("atto", "Atto"), ("femto", "Femto"), ("pico", "Pico"), ("nano", "Nano"), ("tiny", "T"),
                             ("base", "B"), ("large", "L"))
       for tag in ("fcmae_ft_in1k", *(("fcmae_ft_in22k_in1k",) if variant in ("Nano", "T", "B", "L") else ()))},
    **{f"regnety_{n:03}.{tag}": Published(f"regnety('{f'{n}00MF' if n < 10 else f'{n / 10:g}GF'}')", 224, crop)
       for tag, crop, numbers in (
           ("pycls_in1k", 0.875, (2, 4, 6, 8, 16, 32, 40, 64, 80, 120, 160, 320)), ("ra_in1k", 0.95, (32,)),
           ("ra3_in1k", 0.95, (40, 64, 80)), ("tv2_in1k", 0.965, (4, 16, 32, 160, 320)))
       for n in numbers},
    # Of packages: lukemelas's files, and torchvision's.
    **{f"efficientnet_lite{i}": Published(f"efficientnet('Lite{i}')", size, crop, "bicubic", LITE)
       for i, (size, crop) in enumerate(_SCALES[:3])},
    "squeezenet1_1": Published("squeezenet", interpolation="bilinear"),
}  # fmt: skip


def find(name: str) -> Published:
    """The network of this name. Raises UserError for a name that is not in the table, with the nearest ones."""
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, 3, 0.0)
        raise UserError(f"the catalog of weights has no {name!r}; the nearest are {', '.join(near)}")
    return NETWORKS[name]

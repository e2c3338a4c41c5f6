"""Published networks by timm's names: the backbone, the preprocessing and the licence of their weights."""

from dataclasses import dataclass

from imgclf_jax.core.errors import UserError, unknown

type Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]  # (mean, std) of pixels in 0–1

IMAGENET: Normalization = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF: Normalization = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
CLIP: Normalization = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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
    "resnet18.tv_in1k": Published("resnet(18)", interpolation="bilinear"),
    "resnet50.tv_in1k": Published("resnet(50)", interpolation="bilinear"),
}


def find(name: str) -> Published:
    """The network of this name. Raises UserError for a name that is not in the table, with the nearest ones."""
    if name not in NETWORKS:
        raise UserError(unknown("network", name, NETWORKS))
    return NETWORKS[name]

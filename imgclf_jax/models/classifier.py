"""A backbone and its head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from imgclf_jax.core import spec
from imgclf_jax.models.backbones import BACKBONES


class Classifier(nn.Module):
    """Images f32[b, h, w, c] to logits [b, num_classes]: the backbone's features [b, d] and one dense layer.

    The backbone computes in its own dtype; the head in `dtype`, float32 unless told otherwise.
    """

    backbone: nn.Module
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        features = self.backbone(images, train=train)  # [b, d]
        init = nn.initializers.glorot_uniform()
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=init, name="head")(features)


def build(text: str, num_classes: int, precision: str) -> Classifier:
    """The Classifier over the backbone that a spec such as `cnn(widths=(32, 64))` names.

    A backbone with a `dtype` field gets `precision` ("float32" or "bfloat16"), unless the spec says its own.
    """
    make = spec.bind(spec.parse_one(text), BACKBONES, "model")
    settings: dict[str, Any] = {}
    if "dtype" in getattr(make.func, "__dataclass_fields__", {}) and "dtype" not in make.keywords:
        settings["dtype"] = jnp.dtype(precision)
    return Classifier(make(**settings), num_classes)

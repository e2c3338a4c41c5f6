"""The Classifier, a backbone and a linear head, built from the config key `model`."""

import inspect
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from imgclf_jax.core import spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Function, Initializer
from imgclf_jax.models import parts
from imgclf_jax.models.backbones import BACKBONES

# Initializers of the head's kernel [d, num_classes]. Its bias starts at zero.
HEAD_INITS: dict[str, Function] = {
    "glorot_uniform": lambda: nn.initializers.glorot_uniform(),
    "normal": lambda stddev=0.01: nn.initializers.normal(stddev),
    "pytorch_linear": lambda: nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # ± 1 / sqrt(d)
    "zeros": lambda: nn.initializers.zeros,
}


class Classifier(nn.Module):
    """A backbone and a linear head: images f32[b, h, w, c] → features [b, d] → logits [b, num_classes].

    The head computes in `dtype`, the backbone in its own; one with an attribute `applies_head` is called with the head,
    to return logits. A method calls the whole as `(images, train=…)`, or
    `features(images, train)`, `head(features)`, and what a subclass adds.
    """

    backbone: nn.Module
    num_classes: int
    dtype: DTypeLike = jnp.float32
    head_init: Initializer = nn.initializers.glorot_uniform()

    def setup(self) -> None:
        self.head = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=self.head_init)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        if getattr(self.backbone, "applies_head", False) and not self.is_initializing():
            return cast(jax.Array, self.backbone(images, train=train, head=self.head))
        features = self.features(images, train)
        if self.is_initializing():
            self.init_more(features)
        return cast(jax.Array, self.head(features))

    def init_more(self, features: jax.Array) -> None:
        """Initializes further modules of a subclass, by calling them on features [b, d]; does nothing here."""

    def features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The backbone's features [b, d]. Raises ValueError if it returns anything else."""
        features: jax.Array = self.backbone(images, train=train)
        b, shape = images.shape[0], getattr(features, "shape", None)
        if shape is None or len(shape) != 2 or (isinstance(b, int) and shape[0] != b):
            found = f"a {type(features).__name__}" if shape is None else list(shape)
            raise ValueError(f"the backbone returns {found}; it must return features [b, d], here [{b}, d], such as "
                             "the mean over the pixels of each image")  # fmt: skip
        return features


def build(text: str, num_classes: int, precision: str) -> Classifier:
    """Builds a Classifier from the spec of its backbone, such as `cnn(widths=(32, 64))`.

    A backbone is a linen module, or a function that makes one. If it takes `dtype`, it computes in
    `precision` ("float32" or "bfloat16") unless the spec sets `dtype`. Every spec accepts `head_init`, a spec of
    HEAD_INITS in quotes such as 'normal(0.01)', for the head. Raises UserError for an unknown backbone, for arguments
    that do not fit, and for a `dropout` or `drop_path` outside [0, 1).
    """
    call = spec.parse_one(text)
    kwargs = dict(call.kwargs)
    make_init = spec.bind(spec.parse_one(str(kwargs.pop("head_init", "glorot_uniform"))), HEAD_INITS, "head_init")
    for name in ("dropout", "drop_path"):
        if name in kwargs and not 0 <= kwargs[name] < 1:
            raise UserError(f"model={text!r}: {name}={kwargs[name]!r} must be a number from 0 to below 1")
    make = parts.bind(spec.Call(call.name, call.args, kwargs), BACKBONES)
    takes_dtype = "dtype" in inspect.signature(make.func).parameters and "dtype" not in make.keywords
    backbone = make(**{"dtype": jnp.dtype(precision)} if takes_dtype else {})
    if not isinstance(backbone, nn.Module):
        raise UserError(f"model={text!r} is a {type(backbone).__name__}, not a flax.linen.Module; for an nnx module, "
                        "name a function that wraps it by flax.nnx.bridge.ToLinen")  # fmt: skip
    takes = inspect.signature(type(backbone).__call__).parameters
    if "train" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        raise UserError(f"model={text!r}: __call__ takes ({', '.join(takes)}); add train, which is True in training")
    return Classifier(backbone, num_classes, head_init=make_init())
